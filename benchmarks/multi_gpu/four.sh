#!/usr/bin/env bash
# A host with four GPUs: tests of what two cannot show, then speed beside predictions. One call.
#
#     FOLDER=results benchmarks/multi_gpu/four.sh
#
# See parts.sh for what else it reads from the environment.
source "$(dirname "${BASH_SOURCE[0]}")/parts.sh"
plans='["sequential","megatron","auto"]'

tests tests 190 tests/gpu/test_sizes.py tests/gpu/test_several.py -k "4- or of_four or (lightning and 4)"
several pp4 160 '["a:24:1:4"]' \
  '["megatron-core","megatron-core:2","ours:fold","ours:zb-v","ours:dualpipe-v","ours:auto"]' \
  --micro_batches 8
several cp4 90 '["e:8:1:1:4"]' '["megatron-core","ours"]' --plans "$plans"
several ep4 90 '["m:8:1:1:1:4"]' '["megatron-core","ours"]' --plans "$plans"
several tp4 90 '["b:40:4:1"]' "$(rivals)" --plans "$plans"
compared pp4 cp4 ep4 tp4
done_well
