#!/usr/bin/env bash
# Everything that is measured on one GPU, the most important first, within a time budget.
#
#     benchmarks/one_gpu/run.sh [FOLDER] [SECONDS]
#
# FOLDER gets a JSON and a text file for each benchmark and two logs; what was measured when the
# time is over stays there. PYTHON names the interpreter.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
folder=${1:-benchmarks/one_gpu}
budget=${2:-1800}
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$folder"

# `kernels`, `search` and `recipes` stand at the root; an installed package has them inside.
for part in kernels search recipes; do
  [ -e "lightning_dhellam/$part" ] || ln -s "../$part" "lightning_dhellam/$part"
done

left() { echo $((budget - SECONDS)); }
share() { echo $(($(left) * $1 / 100)); }
bench() {
  local name=$1 seconds=$2
  shift 2
  echo "== $name: $seconds s of $(left) s"
  # A little longer than the benchmark's own budget, for its last row and its table.
  timeout --kill-after=10 $((seconds + 20)) \
    "$python" -W ignore -m lightning_dhellam bench "$name" --output "$folder" "$@"
  echo "== $name ended with code $?, $(left) s left"
}

seconds=$(share 15)
echo "== tests of the kernels: $seconds s of $(left) s"
timeout --kill-after=10 "$seconds" "$python" -m pytest -q -x --no-header -p no:cacheprovider \
  -o addopts=--import-mode=importlib -m gpu tests/kernels 2>&1 | tee "$folder/tests.log" | tail -n 15

bench throughput "$(share 62)" --budget "$(share 62)"
bench launch 40
bench gemms "$(share 25)" --budget "$(share 25)"
bench kernels "$(($(left) - 20))" --budget "$(($(left) - 20))"
