"""Triton: one pass over the rows in each direction. Shapes: N rows, H columns.

A row is held in registers, so that the statistics need no second read. The weight's gradient is
summed per program and then over programs, in fixed order: deterministic on a given device.

Backward asks for the next row before it reduces this one: with two programs to a multiprocessor
nothing else would keep the memory busy while their threads wait for each other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_dhellam.kernels.launch import blocks, power_of_two, row_programs, row_warps


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `reference.forward`."""
    x = x.contiguous()
    width = x.shape[-1]
    y = torch.empty_like(x)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    block = power_of_two(width)
    _forward[(rstd.numel(),)](
        x, x, weight, x, y, rstd, width, eps, ADDS=False, BLOCK=block, num_warps=row_warps(block)
    )
    return y, rstd


def residual_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.residual_forward`."""
    x, residual = x.contiguous(), residual.contiguous()
    width = x.shape[-1]
    total, y = torch.empty_like(x), torch.empty_like(x)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    block = power_of_two(width)
    _forward[(rstd.numel(),)](
        x, residual, weight, total, y, rstd, width, eps,
        ADDS=True, BLOCK=block, num_warps=row_warps(block),
    )  # fmt: skip
    return total, y, rstd


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `reference.backward`."""
    dy, x = dy.contiguous(), x.contiguous()
    extra = x if residual is None else residual.contiguous()
    width, rows = x.shape[-1], rstd.numel()
    programs = row_programs(rows, x.device)
    dx = torch.empty_like(x)
    partial = x.new_empty((programs, width), dtype=torch.float32)
    block = power_of_two(width)
    _backward[(programs,)](
        dy, x, weight, rstd, extra, dx, partial, rows, width, blocks(rows, programs),
        ADDS=residual is not None, BLOCK=block, num_warps=row_warps(block),
    )  # fmt: skip
    return dx, partial.sum(0)


@triton.jit
def _forward(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    total: tl.tensor,
    y: tl.tensor,
    rstd: tl.tensor,
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
    scale = tl.rsqrt(tl.sum(wide * wide) / width + eps)
    tl.store(rstd + row, scale)
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + here, (wide * scale * factor).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dy: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    rstd: tl.tensor,
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
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)
        normal = value * scale
        scaled = grad * factor
        result = scale * (scaled - normal * (tl.sum(scaled * normal) / width))
        if ADDS:
            result += branch.to(tl.float32)
        tl.store(dx + row * width + columns, result.to(dx.dtype.element_ty), mask=inside)
        dweight += grad * normal
        row = next_row
    tl.store(partial + program * width + columns, dweight, mask=is_column)
