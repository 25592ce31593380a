# Sourced by the scripts beside it: the parts of a run, each with a limit of its own.
#
# What they read from the environment:
#
#     FOLDER   gets a log for each part, `parts.txt` with code and seconds of each, and a folder of
#              results for each benchmark, which writes there row by row
#     LIMIT    seconds for all parts; a part that is not done by then is ended
#     DEVICE   cuda, or cpu to rehearse in miniature
#     PYTHON   the interpreter
#     ONLY     the name of a part, to run no other
#     DRY      if it is set, parts are printed and not run
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
FOLDER=${FOLDER:-runs/multi_gpu} LIMIT=${LIMIT:-560} DEVICE=${DEVICE:-cuda} PYTHON=${PYTHON:-python3}
export DEVICE PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
few=10 # seconds that a benchmark keeps for its table
least=${LEAST:-15} # seconds below which a part is not begun
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

# `kernels`, `search` and `recipes` stand at the root, and inside of an installed package: this is
# such a one, of links.
if [ -z "${DRY:-}" ]; then
  mkdir -p "$FOLDER/package/lightning_dhellam"
  ln -sfn "$PWD"/lightning_dhellam/* "$PWD"/{kernels,search,recipes} "$FOLDER/package/lightning_dhellam"
  FOLDER=$(cd "$FOLDER" && pwd)
  PYTHONPATH=$FOLDER/package:$PYTHONPATH
fi

# part NAME SECONDS COMMAND...
part() {
  local name=$1 limit=$(($2 * slower)) left=$((LIMIT * slower - SECONDS)) begin=$SECONDS code words
  shift 2
  [ "${ONLY:-$name}" = "$name" ] || return 0
  if [ -n "${DRY:-}" ]; then
    printf -v words ' %q' "$@"
    echo "$name $limit$words" # in one piece, since parts may run side by side
    return
  fi
  if ((left < least)); then
    echo "$name: not begun, $left s are left" | tee -a "$FOLDER/parts.txt"
    return
  fi
  timeout --kill-after=10 "$((limit < left ? limit : left))" "$@" >"$FOLDER/$name.log" 2>&1
  code=$?
  tail -n 25 "$FOLDER/$name.log"
  echo "$name: code $code, $((SECONDS - begin)) s" | tee -a "$FOLDER/parts.txt"
}

# tests NAME SECONDS [GPUS] WORDS...: pytest on the GPUs whose numbers are given, or on all
tests() {
  local name=$1 limit=$2 only=()
  shift 2
  case $1 in [0-9]*)
    only=(env "CUDA_VISIBLE_DEVICES=$1")
    shift
    ;;
  esac
  part "$name" "$limit" ${only[@]+"${only[@]}"} "$PYTHON" -m pytest -q --no-header \
    -p no:cacheprovider -o addopts=--import-mode=importlib "$@"
}

# bench NAME SECONDS GPUS|all BENCHMARK WORDS...
bench() {
  local name=$1 limit=$2 gpus=$3 benchmark=$4 only=()
  shift 4
  [ "$gpus" = all ] || only=(env "CUDA_VISIBLE_DEVICES=$gpus")
  part "$name" "$limit" ${only[@]+"${only[@]}"} "$PYTHON" -W ignore -m lightning_dhellam bench \
    "$benchmark" --device "$DEVICE" --output "$FOLDER/$name" "$@"
}

# several NAME SECONDS CASES SIDES WORDS...: one side takes two thirds of the time at most
several() {
  local name=$1 limit=$2 cases=$3 sides=$4
  shift 4
  bench "$name" "$limit" all several --cases "$cases" --sides "$sides" "${quick[@]}" \
    --budget "$(((limit - few) * slower))" --limit "$((limit * slower * 2 / 3))" "$@"
}

# compared NAME...: predictions of other parts' steps, by the profiles that were taken before them
compared() {
  local name file files=()
  for name in "$@"; do
    for file in "$FOLDER/$name"/several-*.json; do
      [ -e "$file" ] || [ -n "${DRY:-}" ] && files+=("$file")
    done
  done
  [ ${#files[@]} -gt 0 ] || return 0
  part "compare-$(IFS=-; echo "$*")" 60 "$PYTHON" -W ignore -m lightning_dhellam compare "${files[@]}" \
    --cluster "$cluster" ${sizes[@]+"${sizes[@]}"}
}

# The sides of a case with tensor parallelism: the rival's own overlap is one where it can be had.
rivals() {
  if [ "$DEVICE" = cuda ] && timeout 60 "$PYTHON" -c 'import transformer_engine' 2>/dev/null; then
    echo '["megatron-core","megatron-core:tp-overlap","ours"]'
  else
    echo '["megatron-core","ours"]'
  fi
}

# Whether all parts have ended well.
done_well() {
  [ -n "${DRY:-}" ] || ! grep -v ': code 0,' "$FOLDER/parts.txt"
}
