#!/usr/bin/env bash
# A host with eight GPUs: tests of what fewer cannot show, then speed beside predictions. One call.
#
#     FOLDER=results benchmarks/multi_gpu/eight.sh
#
# See parts.sh for what else it reads from the environment.
gpus=8
source "$(dirname "${BASH_SOURCE[0]}")/parts.sh"
plans='["sequential","megatron","auto"]'

tests tests 150 tests/gpu/test_sizes.py -k "8- or eight_have"
several tp8 90 '["b:40:8:1"]' rivals --plans "$plans"
several ep8 80 '["m:8:1:1:1:8"]' '["megatron-core","ours"]' --plans "$plans"
several tp4-pp2 85 '["b:40:4:2"]' '["megatron-core","ours"]' --plans "$plans"
several tp2-cp4 85 '["e:8:2:1:4"]' '["megatron-core","ours"]' --plans "$plans"
compared 60 tp8 ep8 tp4-pp2 tp2-cp4 & # on the host
tests others 60 tests/gpu/test_several.py -k "8- or (lightning and 8)" &
together
done_well
