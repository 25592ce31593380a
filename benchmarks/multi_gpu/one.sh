#!/usr/bin/env bash
# One GPU, in calls of nine minutes, the most important first.
#
#     FOLDER=results benchmarks/multi_gpu/one.sh steps|memory|links
#
# steps are those in 8 bits, of long sequences and that save, against Hugging Face's and
# transformer-engine's; memory is what recomputation costs and saves; links are emulated ones of
# experts, of sequences and in 8 bits. CUDA_VISIBLE_DEVICES says which GPU where there are several.
# See parts.sh for what else it reads from the environment.
gpus=1 calls='steps memory links'
source "$(dirname "${BASH_SOURCE[0]}")/parts.sh"
case=llama-3-8b:8:32000:8192:4 long=llama-3-8b:8:32000:32768:2:auto
saved=llama-3.2-3b:16:128256:4096:16
if [ "$DEVICE" = cpu ]; then
  case=llama-tiny:2:512:64:2 long=llama-tiny:2:512:128:2:auto saved=llama-tiny:2:512:64:2
fi
sides='["ours:current","ours","ours:blockwise","eager"]'
if [ "$DEVICE" = cuda ] && "$PYTHON" -c 'import transformer_engine' 2>/dev/null; then
  sides='["ours:current","ours","transformer-engine:current","ours:blockwise","eager"]'
fi
eight=(--recompute '["gathers"]' --fp8 '["current"]' --fp8_all_gather '[true]')

case $1 in
steps)
  timed fp8 210 all throughput --cases "[\"$case\"]" --limit $((80 * slower)) --sides "$sides"
  timed long 150 all throughput --cases "[\"$long\"]" --limit $((100 * slower)) \
    --sides '["ours","eager"]' --steps 3 --warm_up 2
  bench checkpoint 180 all checkpoint --parts '["steps"]' --case "$saved"
  ;;
memory)
  few=60 # what has begun is measured to its end
  timed over-copies 300 all overlap "${short[@]}" --cells '["a8"]' --links '["copy:110"]' \
    --recompute '["auto:0.5","auto:0.25","none","full","selective"]'
  timed over-sms 240 all overlap "${short[@]}" --cells '["a8"]' --links '["16sm:200"]' \
    --recompute '["full","none","selective"]'
  ;;
links)
  few=60 # likewise
  timed experts 200 all overlap "${short[@]}" --cells '["m4 copy:25","m4 copy:110","m4 16sm:110"]'
  timed shared 200 all overlap "${short[@]}" \
    --cells '["c4 copy:110 all_gather copy:50","d4 copy:110 all_gather copy:50","c4 copy:110 ring copy:25","c4 copy:110 ring copy:110"]'
  timed bits 140 all overlap "${short[@]}" --cells '["a8"]' --links '["copy:110"]' "${eight[@]}"
  ;;
esac
done_well
