"""Triton: each row is read once and written once, where it is known where it goes.

A program takes a few neighbouring rows of the result, or of the tokens, and a stretch of columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_dhellam.kernels.launch import blocks, power_of_two, row_warps
from lightning_dhellam.kernels.permute.reference import Sorted, sort

__all__ = ["Sorted", "permute", "sort", "unpermute", "unpermute_backward"]

_ROWS, _BLOCK = 2, 1024
"""Of a program, which has 4 warps: two 16-byte loads of a 16-bit type per thread."""


def permute(x: Tensor, order: Tensor, place: Tensor | None = None) -> Tensor:
    """Compute what `reference.permute` does.

    Rows of two choices lie too far apart to be read from the cache the second time: 72% of a copy's
    bandwidth on an H200, if bytes count once. With `place` tokens are read in their own order.
    """
    x, order = x.contiguous(), order.contiguous()
    rows, width = len(order), x.shape[1]
    y = x.new_empty(rows, width)
    across = blocks(width, _BLOCK)
    if place is not None and len(x):
        _spread[(blocks(len(x), _ROWS) * across,)](
            x, place.contiguous(), y, len(x), width, across, CHOICES=place.shape[1], ROWS=_ROWS,
            BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
        _clear_free(order, y)
    elif rows:
        _permute[(blocks(rows, _ROWS) * across,)](
            x, order, y, rows, width, across, ROWS=_ROWS, BLOCK=_BLOCK, num_warps=4
        )
    return y


def unpermute(rows: Tensor, place: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Compute what `reference.unpermute` does."""
    rows, place = rows.contiguous(), place.contiguous()
    (tokens, choices), width = place.shape, rows.shape[1]
    y = rows.new_empty((tokens, width), dtype=dtype)
    across = blocks(width, _BLOCK)
    if tokens:
        _unpermute[(blocks(tokens, _ROWS) * across,)](
            rows, place, place if weights is None else weights.contiguous(), y, tokens, width,
            across, CHOICES=choices, WEIGHED=weights is not None, ROWS=_ROWS, BLOCK=_BLOCK,
            num_warps=4,
        )  # fmt: skip
    return y


def unpermute_backward(
    dy: Tensor, rows: Tensor, order: Tensor, place: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute what `reference.unpermute_backward` does."""
    dy, rows, order = dy.contiguous(), rows.contiguous(), order.contiguous()
    place, weights = place.contiguous(), weights.contiguous()
    (tokens, choices), width = place.shape, rows.shape[1]
    d_rows = torch.empty_like(rows)
    d_weights = torch.empty(tokens, choices, dtype=torch.float32, device=dy.device)
    block = power_of_two(width)
    if tokens:
        _unpermute_backward[(tokens,)](
            dy, rows, place, weights, d_rows, d_weights, width, CHOICES=choices, BLOCK=block,
            num_warps=row_warps(block),
        )  # fmt: skip
    _clear_free(order, d_rows)
    return d_rows, d_weights


def _clear_free(order: Tensor, rows: Tensor) -> None:
    """Write zeros to those `rows` [M, H] that are no token's."""
    count, width = rows.shape
    if count:
        _clear[(blocks(count, 8),)](order, rows, count, width, ROWS=8, BLOCK=_BLOCK, num_warps=4)


@triton.jit(do_not_specialize=["rows"])
def _permute(
    x: tl.tensor,
    order: tl.tensor,
    y: tl.tensor,
    rows: int,
    width: int,
    across: int,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    row = (program // across * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (program % across * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows)[:, None] & (column < width)
    source = tl.load(order + row, mask=row < rows, other=-1).to(tl.int64)[:, None]
    here = x + source * width + column
    value = tl.load(here, mask=inside & (source >= 0), other=0.0)
    tl.store(y + row[:, None] * width + column, value, mask=inside)


@triton.jit
def _spread(
    x: tl.tensor,
    place: tl.tensor,
    y: tl.tensor,
    tokens: int,
    width: int,
    across: int,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write each row of `x` to the places of its choices."""
    program = tl.program_id(0)
    token = (program // across * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (program % across * BLOCK + tl.arange(0, BLOCK))[None, :]
    real, is_column = token < tokens, column < width
    here = x + token[:, None] * width + column
    value = tl.load(here, mask=real[:, None] & is_column, other=0.0)
    for choice in tl.static_range(CHOICES):
        at = tl.load(place + token * CHOICES + choice, mask=real, other=-1).to(tl.int64)[:, None]
        tl.store(y + at * width + column, value, mask=(at >= 0) & is_column)


@triton.jit
def _unpermute(
    rows: tl.tensor,
    place: tl.tensor,
    weights: tl.tensor,
    y: tl.tensor,
    tokens: int,
    width: int,
    across: int,
    CHOICES: tl.constexpr,
    WEIGHED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    token = (program // across * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (program % across * BLOCK + tl.arange(0, BLOCK))[None, :]
    real, is_column = token < tokens, column < width
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for choice in tl.static_range(CHOICES):
        at = token * CHOICES + choice
        source = tl.load(place + at, mask=real, other=-1).to(tl.int64)[:, None]
        here = rows + source * width + column
        part = tl.load(here, mask=is_column & (source >= 0), other=0.0).to(tl.float32)
        if WEIGHED:
            part *= tl.load(weights + at, mask=real, other=0.0).to(tl.float32)[:, None]
        total += part
    inside = real[:, None] & is_column
    tl.store(y + token[:, None] * width + column, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _unpermute_backward(
    dy: tl.tensor,
    rows: tl.tensor,
    place: tl.tensor,
    weights: tl.tensor,
    d_rows: tl.tensor,
    d_weights: tl.tensor,
    width: int,
    CHOICES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_column = column < width
    grad = tl.load(dy + token * width + column, mask=is_column, other=0.0).to(tl.float32)
    for choice in tl.static_range(CHOICES):
        at = token * CHOICES + choice
        source = tl.load(place + at).to(tl.int64)
        weight = tl.load(weights + at).to(tl.float32)
        inside = is_column & (source >= 0)
        here = source * width + column
        value = tl.load(rows + here, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_rows + here, (grad * weight).to(d_rows.dtype.element_ty), mask=inside)
        tl.store(d_weights + at, tl.sum(grad * value))


@triton.jit
def _clear(
    order: tl.tensor,
    d_rows: tl.tensor,
    count: int,
    width: int,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    free = (row < count) & (tl.load(order + row, mask=row < count, other=0) < 0)
    if tl.max(free.to(tl.int32)) != 0:
        for start in range(0, width, BLOCK):
            column = (start + tl.arange(0, BLOCK))[None, :]
            here = d_rows + row[:, None] * width + column
            zeros = tl.zeros((ROWS, BLOCK), d_rows.dtype.element_ty)
            tl.store(here, zeros, mask=free[:, None] & (column < width))
