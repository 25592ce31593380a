"""Triton: biases of groups of rows, whose sizes stay on the device, and their gradients."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from lightning_dhellam.kernels.grouped.tables import places_of
from lightning_dhellam.kernels.launch import blocks, power_of_two

_ROWS, _BLOCK = 4, 512
"""Of a program that adds: two 16-byte loads of a 16-bit type for each thread of 4 warps."""

_STRETCH, _COLUMNS = 64, 64
"""Rows that a program of a gradient reads at a time, and its columns."""


def add_bias_(
    y: Tensor,
    biases: Sequence[Tensor],
    ends: Tensor,
    rows: Sequence[int] | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Do what `reference.add_bias_` does; `y` is contiguous."""
    assert y.is_contiguous(), "rows are added to in place, so they must be contiguous"
    places, (count, width) = places_of(biases), y.shape
    across = blocks(width, _BLOCK)
    if count:
        _add[(blocks(count, _ROWS) * across,)](
            y, places.first, places.pitch, places.table, ends,
            ends if scale is None else scale.contiguous(), len(biases), width, across,
            SCALED=scale is not None, LANES=power_of_two(len(biases)), ROWS=_ROWS, BLOCK=_BLOCK,
            num_warps=4,
        )  # fmt: skip
    return y


def bias_grad(
    dy: Tensor,
    grads: Sequence[Tensor],
    fresh: Sequence[bool],
    ends: Tensor,
    rows: Sequence[int] | None = None,
    scale: Tensor | None = None,
) -> None:
    """Do what `reference.bias_grad` does; each sum is in one order."""
    dy = dy.contiguous()
    places, width = places_of(grads, fresh), dy.shape[1]
    across = blocks(width, _COLUMNS)
    _sum[(len(grads) * across,)](
        dy, places.first, places.pitch, places.table, ends,
        ends if scale is None else scale.contiguous(), len(grads), width, across,
        SCALED=scale is not None, ROWS=_STRETCH, BLOCK=_COLUMNS, num_warps=4,
    )  # fmt: skip


@triton.jit
def _add(
    y: tl.tensor,
    first: tl.tensor,
    pitch: tl.tensor,
    table: tl.tensor,
    ends: tl.tensor,
    scale: tl.tensor,
    groups: int,
    width: int,
    across: int,
    SCALED: tl.constexpr,
    LANES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program, lane = tl.program_id(0), tl.arange(0, LANES)
    row = program // across * ROWS + tl.arange(0, ROWS)
    column = (program % across * BLOCK + tl.arange(0, BLOCK))[None, :]
    last = tl.load(ends + lane, mask=lane < groups, other=2**31 - 1)
    group = tl.sum((last[None, :] <= row[:, None]).to(tl.int32), axis=1)
    inside = (group < groups)[:, None] & (column < width)
    place = tl.load(table + group, mask=group < groups, other=0).to(tl.int64)
    bias = tl.load(first + place[:, None] * pitch + column, mask=inside, other=0.0).to(tl.float32)
    if SCALED:
        bias *= tl.load(scale + row, mask=group < groups, other=0.0).to(tl.float32)[:, None]
    here = y + row.to(tl.int64)[:, None] * width + column
    total = tl.load(here, mask=inside, other=0.0).to(tl.float32) + bias
    tl.store(here, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _sum(
    dy: tl.tensor,
    first: tl.tensor,
    pitch: tl.tensor,
    table: tl.tensor,
    ends: tl.tensor,
    scale: tl.tensor,
    groups: int,
    width: int,
    across: int,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    group = tl.program_id(0) // across
    column = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    is_column = column < width
    start = tl.load(ends + group - 1, mask=group > 0, other=0)
    end = tl.load(ends + group)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for begin in range(start, end, ROWS):
        row = begin + tl.arange(0, ROWS)
        here = dy + row.to(tl.int64)[:, None] * width + column[None, :]
        inside = (row < end)[:, None] & is_column[None, :]
        part = tl.load(here, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            part *= tl.load(scale + row, mask=row < end, other=0.0).to(tl.float32)[:, None]
        total += part
    place = tl.load(table + group).to(tl.int64)
    fresh = tl.load(table + groups + group) != 0
    there = first + place * pitch + column
    before = tl.load(there, mask=is_column & (not fresh), other=0.0).to(tl.float32)
    result = before + tl.sum(total, axis=0)
    tl.store(there, result.to(first.dtype.element_ty), mask=is_column)
