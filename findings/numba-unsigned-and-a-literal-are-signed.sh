#!/usr/bin/env bash
# numba 0.68.1 with numpy 2.4.6, seen 2026-11-30.
#
# In NumPy 2 a `uint64` and a Python integer are a `uint64`. In a compiled function of numba they are
# an `int64`, for + and % alike, without a word: of a hash h above 2**63, `h % 10` is the remainder
# of a negative number, and `(h + 1) >> 1` drags its sign along. With `np.uint64(10)` both agree. We
# expected NumPy's types in a function that is NumPy's outside of numba, or a refusal.
#
# Why it matters: counters, hashes and random numbers in 64 bits choose other buckets and samples
# compiled than not, and only for the upper half of all values, which small tests never see. Write
# every literal beside an unsigned number as one.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numba==0.68.1 numpy==2.4.6
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import numba
import numpy as np


def bucket(h):
    return h % 10


def half(h):
    return (h + 1) >> 1


def bucket_of_unsigned(h):
    return h % np.uint64(10)


print(f"numba {numba.__version__}, numpy {np.__version__}")
found = {}
for function in (bucket, half, bucket_of_unsigned):
    compiled = numba.njit(function)
    for h in (np.uint64(2**62 + 1), np.uint64(2**63 + 1)):
        found[function.__name__, int(h)] = int(function(h)), int(compiled(h))
        print(f"{function.__name__:18} of {h}: {int(function(h))}, compiled {int(compiled(h))}")
low, high = 2**62 + 1, 2**63 + 1
for name in ("bucket", "half"):
    assert found[name, low][0] == found[name, low][1], "small numbers have changed"
assert found["bucket_of_unsigned", high] == (high % 10, high % 10), "unsigned has changed"
changed = "the behaviour has changed"
assert found["bucket", high] == (high % 10, (high - 2**64) % 10), changed
assert found["half", high] == ((high + 1) >> 1, (high + 1 - 2**64) >> 1), changed
PYTHON
