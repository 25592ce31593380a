#!/usr/bin/env bash
# A host with two GPUs, in three calls of nine minutes, the most important first.
#
#     FOLDER=results benchmarks/multi_gpu/two.sh tests|rows|predictions
#
# tests are those that need GPUs; rows are of pipelines, shared sequences and experts, against
# Megatron-core's own steps; predictions are those of more than twelve runs, from profiles that were
# taken before them. See parts.sh for what else it reads from the environment.
gpus=2 calls='tests rows predictions'
source "$(dirname "${BASH_SOURCE[0]}")/parts.sh"
plans='["sequential","megatron","auto"]' both='["megatron-core","ours"]'

case $1 in
tests)
  (
    tests kernels 195 0 tests/kernels/test_triton.py -k "fp8 or 8_bits"
    tests lanes 80 0 tests/gpu/test_offloading.py tests/gpu/test_lanes.py
  ) &
  (
    tests eight-bits 150 1 tests/gpu/test_eight_bits.py tests/gpu/test_fsdp.py
    few=40 # what has begun is measured to its end
    timed memory 120 1 memory --cases '["auto","full","experts"]'
  ) &
  together
  tests trains 275 tests/gpu/test_lora.py tests/gpu/test_loss_scale.py tests/gpu/test_no_waiting.py \
    tests/gpu/test_unequal.py tests/gpu/test_transfers.py &
  tests shares 275 tests/gpu/test_experts.py tests/gpu/test_several.py \
    tests/gpu/test_context_parallel.py -k "not killed" &
  together
  ;;
rows)
  several ep2 125 '["m:8:1:1:1:2"]' "$both" --plans "$plans"
  several cp2 195 '["e:8:1:1:2"]' "$both" --plans "$plans"
  several pp2 230 '["a:8:1:2"]' \
    '["megatron-core","megatron-core:2","ours:fold","ours:zb-v","ours:dualpipe-v","ours:auto"]' \
    --micro_batches '[4,8,16]'
  ;;
predictions)
  every='["sequential","megatron","dhellam","interleaved"]'
  several tp2 140 '["a:8:2:1","b:6:2:1"]' '["ours"]' --plans "$every"
  several staged 95 '["a:8:1:2"]' '["ours:fold","ours:zb-v","ours:dualpipe-v"]' --micro_batches '[4,8]'
  several shared 175 '["e:8:1:1:2","a:4:1:1:1:1:2","m:4:1:1:1:2"]' '["ours"]' \
    --plans '["sequential","interleaved"]'
  compared 60 tp2 staged shared
  several rival 80 '["a:8:2:1"]' rivals --plans '["interleaved"]'
  ;;
esac
done_well
