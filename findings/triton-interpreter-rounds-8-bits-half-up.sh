#!/usr/bin/env bash
# triton 3.7.1 with torch 2.13.0, seen 2026-11-30.
#
# In Triton's interpreter a cast of fp32 to float8e4nv (E4M3) rounds numbers in the middle between two
# neighbours up, away from zero; torch's cast, and a GPU's, take the neighbour whose last bit is even.
# Where the carry of that rounding leaves the mantissa, the exponent does not get it: numbers just
# below a power of two come out as half of it. Casts to 16 bits are those of torch. We expected the
# interpreter to compute what the compiled kernel does, to the bit, or to refuse.
#
# Why it matters: kernels that cast to 8 bits are tested in the interpreter where there is no GPU.
# Against a reference they fail there alone, and a kernel that was fitted to the interpreter would be
# wrong on a GPU. Rounding the fp32 number to the format's bits before the cast
# makes the cast exact in both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q triton==3.7.1 numpy
cd "$folder"
cat > run.py <<'PYTHON'
import torch
import triton
import triton.language as tl


@triton.jit
def cast(x, y, BLOCK: tl.constexpr):
    here = tl.arange(0, BLOCK)
    tl.store(y + here, tl.load(x + here).to(y.dtype.element_ty))


print(f"triton {triton.__version__}, torch {torch.__version__}")
# Of three bits: neighbours of 1.0625 are 1 and 1.125, those of 1.1875 are 1.125 and 1.25, and 1.97
# is nearest to 2.
x = torch.tensor([1.0625, 1.1875, 1.97, 1.5])
found = {}
for dtype in (torch.float8_e4m3fn, torch.bfloat16):
    y = torch.empty(4, dtype=dtype)
    cast[(1,)](x, y, BLOCK=4)
    found[dtype] = y.float().tolist(), x.to(dtype).float().tolist()
    print(f"{dtype}: {x.tolist()} are {found[dtype][0]} here and {found[dtype][1]} by torch")
ours, theirs = found[torch.float8_e4m3fn]
assert theirs == [1.0, 1.25, 2.0, 1.5]
assert ours[0] == 1.125, "halves are rounded otherwise"
assert ours[2] == 1.0, "the carry is kept"
assert found[torch.bfloat16][0] == found[torch.bfloat16][1]
PYTHON
TRITON_INTERPRET=1 venv/bin/python -W ignore run.py
