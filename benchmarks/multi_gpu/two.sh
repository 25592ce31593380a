#!/usr/bin/env bash
# A host with two GPUs, in four calls of nine minutes, the most important first.
#
#     FOLDER=results benchmarks/multi_gpu/two.sh tests|rows|alone|predictions
#
# tests are those that need GPUs; rows are of pipelines, shared sequences and experts, against
# Megatron-core's own steps; alone is measured on one GPU each, side by side; predictions are those
# of more than twelve runs, from profiles that were taken before them. See parts.sh for what else
# it reads from the environment.
case ${1:-} in
tests | rows | alone | predictions) ;;
*)
  echo "usage: FOLDER=results $0 tests|rows|alone|predictions" >&2
  exit 2
  ;;
esac
gpus=2
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
alone)
  case=llama-3-8b:8:32000:8192:4 long=llama-3-8b:8:32000:32768:2:auto
  saved=llama-3.2-3b:16:128256:4096:16
  if [ "$DEVICE" = cpu ]; then
    case=llama-tiny:2:512:64:2 long=llama-tiny:2:512:128:2:auto saved=llama-tiny:2:512:64:2
  fi
  (
    timed fp8 230 0 throughput --cases "[\"$case\"]" --limit $((90 * slower)) \
      --sides '["ours","ours:current","ours:blockwise","eager"]'
    timed long 140 0 throughput --cases "[\"$long\"]" --limit $((70 * slower)) \
      --sides '["ours","eager"]'
    bench checkpoint 150 0 checkpoint --parts '["steps"]' --case "$saved"
  ) &
  (
    few=60 # as above, and for longer
    timed experts 180 1 overlap "${short[@]}" \
      --cells '["m4 copy:25","m4 copy:110","m4 16sm:110"]'
    timed gathered 200 1 overlap "${short[@]}" \
      --cells '["c4 copy:110 all_gather copy:50","d4 copy:110 all_gather copy:50","c4 copy:110 ring copy:25","c4 copy:110 ring copy:110"]'
    timed again 150 1 overlap "${short[@]}" --cells '["a4 copy:110"]' \
      --recompute '["selective","full","auto:0.5"]'
  ) &
  together
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
