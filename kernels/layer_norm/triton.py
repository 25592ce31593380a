"""Triton: one pass over the rows in each direction. Shapes: N rows, H columns.

As `rms_norm.triton`, whose notes on registers and on prefetching hold here too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_dhellam.kernels.launch import blocks, power_of_two, row_programs, row_warps


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `reference.forward`."""
    _, y, statistics = _launch(x, None, weight, bias, eps)
    return y, statistics


def residual_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.residual_forward`."""
    return _launch(x, residual.contiguous(), weight, bias, eps)


def _launch(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x = x.contiguous()
    width = x.shape[-1]
    total = x if residual is None else torch.empty_like(x)
    y = torch.empty_like(x)
    statistics = x.new_empty((*x.shape[:-1], 2), dtype=torch.float32)
    block = power_of_two(width)
    _forward[(statistics.numel() // 2,)](
        x, x if residual is None else residual, weight, bias, total, y, statistics, width, eps,
        ADDS=residual is not None, BLOCK=block, num_warps=row_warps(block),
    )  # fmt: skip
    return total, y, statistics


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, statistics: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.backward`."""
    dy, x, statistics = dy.contiguous(), x.contiguous(), statistics.contiguous()
    extra = x if residual is None else residual.contiguous()
    width, rows = x.shape[-1], statistics.numel() // 2
    programs = row_programs(rows, x.device)
    dx = torch.empty_like(x)
    partial = x.new_empty((2, programs, width), dtype=torch.float32)
    block = power_of_two(width)
    _backward[(programs,)](
        dy, x, weight, statistics, extra, dx, partial, rows, width, blocks(rows, programs),
        ADDS=residual is not None, BLOCK=block, num_warps=row_warps(block),
    )  # fmt: skip
    dweight, dbias = partial.sum(1)
    return dx, dweight, dbias


@triton.jit
def _forward(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    total: tl.tensor,
    y: tl.tensor,
    statistics: tl.tensor,
    width: int,
    eps: float,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    here = row * width + columns
    wide = tl.load(x + here, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        wide += tl.load(residual + here, mask=inside, other=0.0).to(tl.float32)
        # What is normalised is the sum as it is stored.
        rounded = wide.to(total.dtype.element_ty)
        tl.store(total + here, rounded, mask=inside)
        wide = rounded.to(tl.float32)
    mean = tl.sum(wide) / width
    centred = tl.where(inside, wide - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred) / width + eps)
    tl.store(statistics + 2 * row, mean)
    tl.store(statistics + 2 * row + 1, scale)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    result = centred * scale * factor + shift
    tl.store(y + here, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dy: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    statistics: tl.tensor,
    residual: tl.tensor,
    dx: tl.tensor,
    partial: tl.tensor,
    rows: int,
    width: int,
    rounds: int,
    ADDS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0)
    columns = tl.arange(0, BLOCK)
    is_column = columns < width
    factor = tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    row = program
    inside = is_column & (row < rows)
    next_dy = tl.load(dy + row * width + columns, mask=inside, other=0.0)
    next_x = tl.load(x + row * width + columns, mask=inside, other=0.0)
    for _ in range(rounds):
        grad, value = next_dy.to(tl.float32), next_x.to(tl.float32)
        inside = is_column & (row < rows)
        if ADDS:
            branch = tl.load(residual + row * width + columns, mask=inside, other=0.0)
        next_row = row + programs
        is_next = is_column & (next_row < rows)
        next_dy = tl.load(dy + next_row * width + columns, mask=is_next, other=0.0)
        next_x = tl.load(x + next_row * width + columns, mask=is_next, other=0.0)
        mean = tl.load(statistics + 2 * row, mask=row < rows, other=0.0)
        scale = tl.load(statistics + 2 * row + 1, mask=row < rows, other=0.0)
        normal = (value - mean) * scale
        scaled = grad * factor
        along = tl.sum(scaled * normal) / width
        result = scale * (scaled - tl.sum(scaled) / width - normal * along)
        if ADDS:
            result += branch.to(tl.float32)
        tl.store(dx + row * width + columns, result.to(dx.dtype.element_ty), mask=inside)
        dweight += grad * normal
        dbias += grad
        row = next_row
    tl.store(partial + program * width + columns, dweight, mask=is_column)
    tl.store(partial + (programs + program) * width + columns, dbias, mask=is_column)
