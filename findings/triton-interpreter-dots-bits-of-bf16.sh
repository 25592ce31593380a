#!/usr/bin/env bash
# triton 3.7.1 in its interpreter (with torch 2.13.0, no GPU), seen 2026-11-30.
#
# `tl.dot` of two bfloat16 blocks is not their product in the interpreter: the numbers it gives are
# those of the operands' 16-bit patterns, taken for integers. Nothing is said. With float16 and with
# float32 operands the product is right, and so it is with the bfloat16 blocks converted to float32
# before the dot.
#
# Why it matters: the interpreter is how kernels are tested where there is no GPU. A right kernel for
# bfloat16 fails there by orders of magnitude, and who loosens the test to let it pass tests nothing.
# Convert to float32 before a dot when interpreting, or test in float16.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q triton==3.7.1 numpy
cd "$folder"
cat >dots.py <<'PYTHON'
from importlib.metadata import version

import torch
import triton
import triton.language as tl

SIZE = 16


@triton.jit
def product(a, b, c, SIZE: tl.constexpr, WIDENS: tl.constexpr):
    """Multiply two square blocks."""
    rows = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    left, right = tl.load(a + rows), tl.load(b + rows)
    if WIDENS:
        left, right = left.to(tl.float32), right.to(tl.float32)
    tl.store(c + rows, tl.dot(left, right, input_precision="ieee"))


print(f"triton {version('triton')}, torch {version('torch')}, interpreted")
torch.manual_seed(0)
whole = torch.randn(2, SIZE, SIZE)
errors = {}
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    for widens in (False, True):
        a, b = whole.to(dtype).unbind()
        c = torch.empty(SIZE, SIZE)
        product[(1,)](a, b, c, SIZE=SIZE, WIDENS=widens)
        right = a.double() @ b.double()
        error = ((c.double() - right).norm() / right.norm()).item()
        errors[dtype, widens] = error
        how = "converted to float32 before" if widens else "as they are"
        print(f"{str(dtype):15} {how:28} relative error {error:.1e}")
wrong = errors.pop((torch.bfloat16, False))
assert max(errors.values()) < 1e-3, "something else is wrong as well"
assert wrong > 1e3, "bfloat16 is right now"
bits = [x.bfloat16().view(torch.uint16).double() for x in whole]
print(f"SEEN: bfloat16 is off by {wrong:.0e} times the product")
PYTHON
TRITON_INTERPRET=1 venv/bin/python -W ignore dots.py
