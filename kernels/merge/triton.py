"""Triton: each output is read once and the merged one written once.

A program takes one head of neighbouring tokens: their log-sum-exps lie side by side, and so do the
channels of each.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_dhellam.kernels.launch import blocks, power_of_two

_TOKENS = 16
"""Of a program: with heads of 128, two 16-byte loads of a 16-bit type per thread."""


def forward(
    out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute what `reference.forward` does."""
    out, lse, other, other_lse = (t.contiguous() for t in (out, lse, other, other_lse))
    batch, heads, rows = lse.shape
    size = out.shape[2] // heads
    merged = out.new_empty(out.shape, dtype=dtype)
    total = torch.empty_like(lse)
    _merge[(blocks(rows, _TOKENS) * batch * heads,)](
        out, lse, other, other_lse, merged, total, batch, heads, rows, rows - other.shape[0],
        SIZE=size, WIDTH=power_of_two(size), TOKENS=_TOKENS, num_warps=4,
    )  # fmt: skip
    return merged, total


@triton.jit(do_not_specialize=["rows", "start"])
def _merge(
    out: tl.tensor,
    lse: tl.tensor,
    other: tl.tensor,
    other_lse: tl.tensor,
    merged: tl.tensor,
    total: tl.tensor,
    batch: int,
    heads: int,
    rows: int,
    start: int,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    head = program % heads
    sample = program // heads % batch
    token = program // (heads * batch) * TOKENS + tl.arange(0, TOKENS)
    inside = token < rows
    late = inside & (token >= start)
    here = (sample * heads + head) * rows + token
    there = (sample * heads + head) * (rows - start) + token - start
    first = tl.load(lse + here, mask=inside, other=-float("inf"))
    second = tl.load(other_lse + there, mask=late, other=-float("inf"))
    highest = _origin(tl.maximum(first, second))
    whole = highest + tl.log(tl.exp(first - highest) + tl.exp(second - highest))
    # To the bit, where there is nothing to merge.
    whole = tl.where(second == -float("inf"), first, whole)
    tl.store(total + here, whole, mask=inside)
    column = tl.arange(0, WIDTH)[None, :]
    real = column < SIZE
    offset = ((token * batch + sample) * heads + head)[:, None] * SIZE + column
    shifted = (((token - start) * batch + sample) * heads + head)[:, None] * SIZE + column
    x = tl.load(out + offset, mask=inside[:, None] & real, other=0.0).to(tl.float32)
    y = tl.load(other + shifted, mask=late[:, None] & real, other=0.0).to(tl.float32)
    a, b = tl.exp(first - _origin(whole)), tl.exp(second - _origin(whole))
    result = x * a[:, None] + y * b[:, None]
    tl.store(merged + offset, result.to(merged.dtype.element_ty), mask=inside[:, None] & real)


@triton.jit
def _origin(lse: tl.tensor) -> tl.tensor:
    """What exponents are relative to: not -inf, for -inf - -inf is NaN."""
    return tl.where(lse == -float("inf"), 0.0, lse)
