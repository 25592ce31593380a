# Sourced by the scripts beside it: the parts of a run, each with a limit of its own.
#
# They set `gpus`, as many as must be visible, and `calls`, the words of which their first argument
# must be one, if they take any. What they read from the environment:
#
#     FOLDER   gets a log for each part, `parts.txt` with code and seconds of each, and a folder of
#              results for each benchmark, which writes there row by row
#     LIMIT    seconds for all parts; a part that is not done by then is ended
#     LEAST    seconds without which a part is not begun
#     MOST     seconds that a part takes at most, whatever its own limit
#     DEVICE   cuda, or cpu to rehearse in miniature
#     PYTHON   the interpreter
#     ONLY     the name of a part, to run no other
#     DRY      if it is set, parts are printed and not run: name, the second at which it begins if
#              all before it take their whole limits, its limit, and its command
set -uo pipefail
if [ -n "${calls:-}" ] && [[ ! ${1:-} =~ ^(${calls// /|})$ ]]; then
  echo "usage: FOLDER=results $0 ${calls// /|}" >&2
  exit 2
fi
script=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit 2
FOLDER=${FOLDER:-runs/multi_gpu} LIMIT=${LIMIT:-560} DEVICE=${DEVICE:-cuda} PYTHON=${PYTHON:-python3}
export DEVICE PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
few=25 # seconds that a benchmark keeps for its start and its table
least=${LEAST:-30}
cluster=h200-64 slower=1
quick=(--repeats 3 --search_time 5 --steps 2)
short=(--rounds 2 --repeats 3 --search_time 5 --plans '["sequential","megatron","dhellam","auto"]')
sizes=()
if [ "$DEVICE" = cpu ]; then
  export TORCHDYNAMO_DISABLE=1
  cluster=benchmarks/multi_gpu/rehearsal.yaml slower=8
  quick=(--repeats 1 --search_time 0.1 --steps 1 --vocabulary 512)
  short=(--rounds 1 --repeats 1 --search_time 0.1 --plans '["sequential","megatron"]')
  sizes=(--vocabulary 512 --rehearsal)
fi

if [ -n "${ONLY:-}" ]; then
  names=$(ONLY='' DRY=1 DEVICE=cpu bash "$script" "$@" | cut -d ' ' -f 1) || exit 2
  if ! grep -qxF -- "$ONLY" <<<"$names"; then
    echo "ONLY=$ONLY is not a part: use one of "$names >&2
    exit 2
  fi
fi

if [ -n "${DRY:-}" ]; then
  clock=$(mktemp) || exit 2 # when each part would end
  trap 'rm -f "$clock"' EXIT
  unset SECONDS # which makes it a variable like others
  SECONDS=0
else
  if [ "$DEVICE" = cuda ]; then
    there=$(timeout 60 "$PYTHON" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null)
    if ! [ "${there:-0}" -ge "$gpus" ] 2>/dev/null; then
      echo "$(basename "$0") needs $gpus GPUs, and ${there:-0} are visible to $PYTHON" >&2
      exit 2
    fi
  fi
  # `kernels`, `search` and `recipes` stand at the root, and inside of an installed package: this is
  # such a one, of links.
  mkdir -p "$FOLDER/package/lightning_dhellam" || exit 2
  FOLDER=$(cd "$FOLDER" && pwd) && touch "$FOLDER/parts.txt" || exit 2
  ln -sfn "$PWD"/lightning_dhellam/* "$PWD"/{kernels,search,recipes} \
    "$FOLDER/package/lightning_dhellam" || exit 2
  PYTHONPATH=$FOLDER/package:$PYTHONPATH
  export PYTHONSAFEPATH=1 # or the folder they stand in would come first, where they are apart
  before=$(wc -l <"$FOLDER/parts.txt") # lines of other calls
fi

# Whether a part is to run.
chosen() {
  [ "${ONLY:-$1}" = "$1" ]
}

# within SECONDS: as many, or as are left
within() {
  local limit=$(($1 * slower)) left=$((LIMIT * slower - SECONDS))
  ((limit < left)) || limit=$left
  ((limit < ${MOST:-$limit})) || limit=${MOST:-$limit}
  echo "$limit"
}

# told WORDS...: how a part has ended
told() {
  echo "$@" | tee -a "$FOLDER/parts.txt"
}

# part NAME SECONDS COMMAND...: if `proof` is set, its log must have that
part() {
  local name=$1 limit=$2 left=$((LIMIT * slower - SECONDS)) begin=$SECONDS code words
  shift 2
  chosen "$name" || return 0
  if [ -n "${DRY:-}" ]; then
    limit=$((limit * slower))
    printf -v words ' %q' "$@"
    echo "$name $begin $limit$words" # in one piece, since parts may run side by side
    SECONDS=$((begin + limit))
    echo "$SECONDS" >>"$clock"
    return
  fi
  if ((left < least)); then
    told "$name: not begun, $left s are left"
    return
  fi
  timeout --kill-after=5 "$(within "$limit")" "$@" >"$FOLDER/$name.log" 2>&1
  code=$?
  tail -n 25 "$FOLDER/$name.log"
  if ((code == 0)) && [ -n "${proof:-}" ] && ! grep -Eq "$proof" "$FOLDER/$name.log"; then
    code="0 with nothing done"
  fi
  told "$name: code $code, $((SECONDS - begin)) s"
}

# Wait for parts that run side by side.
together() {
  wait
  [ -z "${DRY:-}" ] || SECONDS=$(sort -n "$clock" | tail -n 1)
}

# tests NAME SECONDS [GPUS] WORDS...: pytest on the GPUs whose numbers are given, or on all
tests() {
  local name=$1 limit=$2 only=() proof=''
  shift 2
  # On a CPU all may be skipped.
  [ "$DEVICE" = cpu ] || proof='[0-9] passed.* in [0-9]'
  case $1 in [0-9]*)
    only=(env "CUDA_VISIBLE_DEVICES=$1")
    shift
    ;;
  esac
  part "$name" "$limit" ${only[@]+"${only[@]}"} "$PYTHON" -m pytest -q -rs --no-header \
    -p no:cacheprovider -o addopts=--import-mode=importlib -o pythonpath= --tb=short \
    -p benchmarks.multi_gpu.at_once "$@"
}

# bench NAME SECONDS GPUS|all BENCHMARK WORDS...
bench() {
  local name=$1 limit=$2 gpus=$3 benchmark=$4 only=()
  shift 4
  [ "$gpus" = all ] || only=(env "CUDA_VISIBLE_DEVICES=$gpus")
  part "$name" "$limit" ${only[@]+"${only[@]}"} "$PYTHON" -W ignore -m lightning_dhellam bench \
    "$benchmark" --device "$DEVICE" --output "$FOLDER/$name" "$@"
}

# timed NAME SECONDS GPUS|all BENCHMARK WORDS...: one that ends in time by itself, with its table
timed() {
  local name=$1 limit=$2 gpus=$3 benchmark=$4 budget=$(($(within "$2") - few * slower))
  shift 4
  bench "$name" "$limit" "$gpus" "$benchmark" --budget "$((budget > 1 ? budget : 1))" "$@"
}

# several NAME SECONDS CASES SIDES|rivals WORDS...: one side takes two thirds of the time at most
several() {
  local name=$1 limit=$2 cases=$3 sides=$4 begin=$SECONDS
  shift 4
  chosen "$name" || return 0
  if [ "$sides" = rivals ]; then
    sides=$(rivals "$name")
    limit=$((limit - (SECONDS - begin) / slower))
  fi
  timed "$name" "$limit" all several --cases "$cases" --sides "$sides" "${quick[@]}" \
    --limit "$((($(within "$limit") - few * slower) * 2 / 3))" "$@"
}

# compared SECONDS NAME...: predictions of parts' steps, by the profiles that were taken before them
compared() {
  local limit=$1 name file files=() part
  shift
  part=compare-$(IFS=-; echo "$*")
  chosen "$part" || return 0
  for name in "$@"; do
    for file in "$FOLDER/$name"/several-*.json; do
      [ -e "$file" ] || [ -n "${DRY:-}" ] && files+=("$file")
    done
  done
  if [ ${#files[@]} -eq 0 ]; then
    told "$part: not begun, nothing was measured"
    return
  fi
  part "$part" "$limit" "$PYTHON" -W ignore -m lightning_dhellam compare "${files[@]}" \
    --cluster "$cluster" ${sizes[@]+"${sizes[@]}"}
}

# rivals NAME: the sides of a part with tensor parallelism. The rival's own overlap is one where it
# can be had.
rivals() {
  local code=1 seconds
  if [ "$DEVICE" = cuda ]; then
    seconds=$(within 30)
    ((seconds > 0)) && timeout "$seconds" "$PYTHON" -c 'import transformer_engine' 2>/dev/null
    code=$?
    ((code == 0)) || echo "$1: without megatron-core:tp-overlap, since transformer_engine is not" \
      "imported in $seconds s (code $code)" >&2
  fi
  if ((code == 0)); then
    echo '["megatron-core","megatron-core:tp-overlap","ours"]'
  else
    echo '["megatron-core","ours"]'
  fi
}

# Whether all parts of this call have ended well, and there was one.
done_well() {
  [ -z "${DRY:-}" ] || return 0
  local lines
  lines=$(tail -n "+$((before + 1))" "$FOLDER/parts.txt")
  [ -n "$lines" ] && ! grep -v ': code 0,' <<<"$lines"
}
