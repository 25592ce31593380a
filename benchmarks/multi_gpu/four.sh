#!/usr/bin/env bash
# A host with four GPUs: tests of what two cannot show, then speed beside predictions. One call.
#
#     FOLDER=results benchmarks/multi_gpu/four.sh
#
# See parts.sh for what else it reads from the environment.
gpus=4
source "$(dirname "${BASH_SOURCE[0]}")/parts.sh"
plans='["sequential","megatron","auto"]'

tests tests 150 tests/gpu/test_sizes.py tests/gpu/test_several.py -k "4- and not 8-"
several pp4 120 '["a:24:1:4"]' \
  '["megatron-core","megatron-core:2","ours:fold","ours:zb-v","ours:dualpipe-v","ours:auto"]' \
  --micro_batches 8
several cp4 70 '["e:8:1:1:4"]' '["megatron-core","ours"]' --plans "$plans"
several ep4 70 '["m:8:1:1:1:4"]' '["megatron-core","ours"]' --plans "$plans"
several tp4 80 '["b:40:4:1"]' rivals --plans "$plans"
compared 60 pp4 cp4 ep4 tp4 & # on the host
tests others 60 tests/gpu/test_sizes.py tests/gpu/test_several.py -k "of_four or (lightning and 4)" &
together
done_well
