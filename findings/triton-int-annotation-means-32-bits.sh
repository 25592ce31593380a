#!/usr/bin/env bash
# triton 3.7.1 (also seen with 3.6.0)
#
# A kernel's parameter without an annotation has the width that its argument needs: 2**32 comes as
# a 64-bit integer. With Python's own annotation `int` it is a 32-bit integer whatever is given,
# because the names of annotations are looked up among Triton's names of types, where `int` is one.
# An annotation that names no type of Triton's, such as `tl.tensor`, changes nothing.
#
# It matters where kernels are annotated for readers and type checkers: numbers of elements and
# thresholds of random words pass 2**31 in use that small tests never see. Kernels that only a GPU
# launches can be checked without one, by the type that each parameter's annotation stands for.
#
# Seen on 2026-11-30.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q triton==3.7.1
cat >"$folder/run.py" <<'PYTHON'
import inspect

import triton
import triton.language as tl
from triton.backends.compiler import BaseBackend
from triton.runtime.jit import create_function_from_signature


@triton.jit
def plain(x, size):
    tl.store(x, size)


@triton.jit
def annotated(x: tl.tensor, size: int):
    tl.store(x, size)


@triton.jit
def tensor(x: tl.tensor, size: tl.tensor):
    tl.store(x, size)


def kind(kernel, size):
    """The type that the launcher gives to `size`."""
    bind = create_function_from_signature(
        inspect.signature(kernel.fn), kernel.params, BaseBackend
    )
    _, kinds, _ = bind(1 << 40, size)  # any number in place of a pointer
    return kinds[1][0]


print("triton", triton.__version__)
found = {}
for name, kernel in (("plain", plain), ("int", annotated), ("tl.tensor", tensor)):
    found[name] = [kind(kernel, size) for size in (3, 2**32)]
    print(f"size: {name:10} 3 is {found[name][0]}, 2**32 is {found[name][1]}")
assert found == {"plain": ["i32", "i64"], "int": ["i32", "i32"], "tl.tensor": ["i32", "i64"]}
PYTHON
cd "$folder"
"$folder/venv/bin/python" run.py
