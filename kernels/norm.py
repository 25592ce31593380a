"""Both norms in Triton: one pass over the rows in each direction. Shapes: N rows, H columns.

LayerNorm subtracts a mean and adds a bias (`CENTRES`), RMSNorm does neither. A row is held in
registers, so that the statistics need no second read. The gradients of weight and bias are summed
per program and then over programs, in fixed order: deterministic on a given device.

Backward asks for the next row and its statistics before it reduces this one: with two programs to a
multiprocessor nothing else would keep the memory busy while their threads wait for each other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_dhellam.kernels.launch import blocks, power_of_two, row_programs, row_warps


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of `x` and `residual` [..., H], the sum normalised, and its statistics in fp32.

    These are the reciprocal deviation [..., 1], with a bias the mean and that [..., 2].
    """
    x = x.contiguous()
    width = x.shape[-1]
    total = x if residual is None else torch.empty_like(x)
    y = torch.empty_like(x)
    statistics = x.new_empty((*x.shape[:-1], 1 if bias is None else 2), dtype=torch.float32)
    block = power_of_two(width)
    _forward[(x.numel() // width,)](
        x, x if residual is None else residual.contiguous(), weight,
        weight if bias is None else bias, total, y, statistics, width, eps,
        ADDS=residual is not None, CENTRES=bias is not None, BLOCK=block,
        num_warps=row_warps(block),
    )  # fmt: skip
    return total, y, statistics


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, statistics: Tensor, residual: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient by `x` [..., H], plus `residual`, and those of the parameters in fp32.

    The latter are [1, H] of the weight, or [2, H] of weight and bias, as there are statistics.
    """
    dy, x, statistics = dy.contiguous(), x.contiguous(), statistics.contiguous()
    extra = x if residual is None else residual.contiguous()
    width, parameters = x.shape[-1], statistics.shape[-1]
    rows = x.numel() // width
    programs = row_programs(rows, x.device)
    dx = torch.empty_like(x)
    partial = x.new_empty((parameters, programs, width), dtype=torch.float32)
    block = power_of_two(width)
    _backward[(programs,)](
        dy, x, weight, statistics, extra, dx, partial, rows, width, blocks(rows, programs),
        ADDS=residual is not None, CENTRES=parameters == 2, BLOCK=block,
        # A second sum of parameters would leave registers for one program to a multiprocessor only.
        num_warps=min(16, parameters * row_warps(block)),
    )  # fmt: skip
    return dx, partial.sum(1)


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
    CENTRES: tl.constexpr,
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
    if CENTRES:
        mean = tl.sum(wide) / width
        wide = tl.where(inside, wide - mean, 0.0)
    scale = tl.rsqrt(tl.sum(wide * wide) / width + eps)
    # Asked for this late, it takes no registers while threads wait for each other.
    factor = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    result = wide * scale * factor
    if CENTRES:
        tl.store(statistics + 2 * row, mean)
        tl.store(statistics + 2 * row + 1, scale)
        result += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    else:
        tl.store(statistics + row, scale)
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
    CENTRES: tl.constexpr,
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
    next_mean, next_scale = _statistics_of(statistics, row, rows, CENTRES)
    for _ in range(rounds):
        grad, value = next_dy.to(tl.float32), next_x.to(tl.float32)
        mean, scale = next_mean, next_scale
        inside = is_column & (row < rows)
        if ADDS:
            branch = tl.load(residual + row * width + columns, mask=inside, other=0.0)
        next_row = row + programs
        is_next = is_column & (next_row < rows)
        next_dy = tl.load(dy + next_row * width + columns, mask=is_next, other=0.0)
        next_x = tl.load(x + next_row * width + columns, mask=is_next, other=0.0)
        next_mean, next_scale = _statistics_of(statistics, next_row, rows, CENTRES)
        normal = (value - mean) * scale
        scaled = grad * factor
        if CENTRES:
            # One exchange between the threads for both sums.
            along, level = tl.split(tl.sum(tl.join(scaled * normal, scaled), axis=0))
            result = scale * (scaled - level / width - normal * (along / width))
            dbias += grad
        else:
            result = scale * (scaled - normal * (tl.sum(scaled * normal) / width))
        if ADDS:
            result += branch.to(tl.float32)
        tl.store(dx + row * width + columns, result.to(dx.dtype.element_ty), mask=inside)
        dweight += grad * normal
        row = next_row
    tl.store(partial + program * width + columns, dweight, mask=is_column)
    if CENTRES:
        tl.store(partial + (programs + program) * width + columns, dbias, mask=is_column)


@triton.jit
def _statistics_of(
    statistics: tl.tensor, row: tl.tensor, rows: int, CENTRES: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Mean, 0 where none is subtracted, and reciprocal deviation of a row."""
    if CENTRES:
        mean = tl.load(statistics + 2 * row, mask=row < rows, other=0.0)
        scale = tl.load(statistics + 2 * row + 1, mask=row < rows, other=0.0)
    else:
        mean = 0.0
        scale = tl.load(statistics + row, mask=row < rows, other=0.0)
    return mean, scale
