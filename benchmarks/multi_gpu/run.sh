#!/usr/bin/env bash
# Everything that is measured on several GPUs of one host, the most important first.
#
#     benchmarks/multi_gpu/run.sh GPUS FOLDER SECONDS CASE...
#
# CASE is shape:layers:tensor:pipeline of `dhellam bench several`. FOLDER gets a log of the tests, a
# JSON and a text file of the benchmark, and a folder with the files of each search; what was
# measured when the time is over stays there. PYTHON names the interpreter. The scripts named by a
# number of GPUs call this one.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
gpus=$1 folder=$2 budget=$3
shift 3
python=${PYTHON:-python3}
export PYTHONUNBUFFERED=1 PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$folder"

# `kernels`, `search` and `recipes` stand at the root; an installed package has them inside.
for part in kernels search recipes; do
  [ -e "lightning_dhellam/$part" ] || ln -s "../$part" "lightning_dhellam/$part"
done

left() { echo $((budget - SECONDS)); }

seconds=$(($(left) * 35 / 100))
echo "== tests on $gpus GPUs: $seconds s of $(left) s"
timeout --kill-after=10 "$seconds" "$python" -m pytest -q --no-header -p no:cacheprovider \
  -o addopts=--import-mode=importlib -m gpu tests/gpu/test_several.py 2>&1 |
  tee "$folder/tests.log" | tail -n 25

cases=$(printf ',"%s"' "$@")
echo "== several: $(left) s"
timeout --kill-after=10 "$(($(left) - 10))" "$python" -W ignore -m lightning_dhellam bench \
  several --cases "[${cases:1}]" --budget "$(($(left) - 25))" --output "$folder"
echo "== ended with code $?, $(left) s left"
