"""Triton: each element is read and written once. Shapes: N rows, F columns of the result.

Where what is made is measured, fewer programs go through it, and each leaves the largest number
that it has made.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_dhellam.kernels.launch import blocks, part_programs

_BLOCK = 2048
_EACH = 7
"""Programs that a multiprocessor has at once, where what they make is measured."""


def forward(gate_up: Tensor) -> Tensor:
    """Compute what `reference.forward` does."""
    return _forward_of(gate_up, None)[0]


def forward_measured(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what `reference.forward_measured` does."""
    return _forward_of(gate_up, None, measures=True)


def weighted_forward(gate_up: Tensor, weights: Tensor) -> Tensor:
    """Compute what `reference.weighted_forward` does."""
    return _forward_of(gate_up, weights.contiguous())[0]


def backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """Compute what `reference.backward` does."""
    return _backward_of(dy, gate_up, None)[0]


def backward_measured(dy: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what `reference.backward_measured` does."""
    grad, _, largest = _backward_of(dy, gate_up, None, measures=True)
    return grad, largest


def weighted_backward(dy: Tensor, gate_up: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what `reference.weighted_backward` does."""
    grad, partial, _ = _backward_of(dy, gate_up, weights.contiguous())
    return grad, partial.sum(1)


def _forward_of(
    gate_up: Tensor, weights: Tensor | None, *, measures: bool = False
) -> tuple[Tensor, Tensor]:
    """The result, and the largest numbers that programs have made if it `measures` them."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    y = gate_up.new_empty((*gate_up.shape[:-1], width))
    across = blocks(width, _BLOCK)
    tiles = y.numel() // width * across
    programs, largest = _programs(tiles, y, measures)
    if tiles:
        _forward[(programs,)](
            gate_up, gate_up if weights is None else weights, y, largest, width, across, tiles,
            WEIGHTED=weights is not None, MEASURES=measures, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return y, largest


def _backward_of(
    dy: Tensor, gate_up: Tensor, weights: Tensor | None, *, measures: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradient, those of the weights [N, blocks] by the blocks of each row, and the largest."""
    dy, gate_up = dy.contiguous(), gate_up.contiguous()
    width = dy.shape[-1]
    grad = torch.empty_like(gate_up)
    across = blocks(width, _BLOCK)
    rows = dy.numel() // width
    count = 0 if weights is None else rows
    partial = torch.empty(count, across, dtype=torch.float32, device=dy.device)
    programs, largest = _programs(rows * across, dy, measures)
    if rows:
        _backward[(programs,)](
            dy, gate_up, dy if weights is None else weights, grad, partial, largest, width, across,
            rows * across, WEIGHTED=weights is not None, MEASURES=measures, BLOCK=_BLOCK,
            num_warps=4,
        )  # fmt: skip
    return grad, partial, largest


def _programs(tiles: int, like: Tensor, measures: bool) -> tuple[int, Tensor]:
    """How many share the tiles, and where they leave the largest number of each."""
    programs = min(tiles, part_programs(like.device, _EACH)) if measures else tiles
    # Without a tile there is a part all the same, of no number.
    largest = torch.zeros if measures and not tiles else torch.empty
    size = max(1, programs) if measures else 0
    return programs, largest(size, dtype=torch.float32, device=like.device)


@triton.jit
def _forward(
    gate_up: tl.tensor,
    weights: tl.tensor,
    y: tl.tensor,
    largest: tl.tensor,
    width: int,
    across: int,
    tiles: int,
    WEIGHTED: tl.constexpr,
    MEASURES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    most = tl.zeros((BLOCK,), tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tl.cast(tile // across, tl.int64)
        columns = tile % across * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        at_gate = gate_up + row * 2 * width + columns
        gate = tl.load(at_gate, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(at_gate + width, mask=inside, other=0.0).to(tl.float32)
        result = gate * tl.sigmoid(gate) * up
        if WEIGHTED:
            result *= tl.load(weights + row).to(tl.float32)
        made = result.to(y.dtype.element_ty)
        tl.store(y + row * width + columns, made, mask=inside)
        if MEASURES:
            most = tl.maximum(most, tl.abs(made.to(tl.float32)))
    if MEASURES:
        tl.store(largest + tl.program_id(0), tl.max(most))


@triton.jit
def _backward(
    dy: tl.tensor,
    gate_up: tl.tensor,
    weights: tl.tensor,
    grad: tl.tensor,
    partial: tl.tensor,
    largest: tl.tensor,
    width: int,
    across: int,
    tiles: int,
    WEIGHTED: tl.constexpr,
    MEASURES: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    most = tl.zeros((BLOCK,), tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = tl.cast(tile // across, tl.int64)
        columns = tile % across * BLOCK + tl.arange(0, BLOCK)
        inside = columns < width
        start = row * 2 * width + columns
        wide = tl.load(dy + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(gate_up + start, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up + start + width, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        if WEIGHTED:
            tl.store(partial + tile, tl.sum(wide * gate * sigmoid * up))
            wide *= tl.load(weights + row).to(tl.float32)
        dgate = (wide * up * sigmoid * (1 + gate * (1 - sigmoid))).to(grad.dtype.element_ty)
        dup = (wide * gate * sigmoid).to(grad.dtype.element_ty)
        tl.store(grad + start, dgate, mask=inside)
        tl.store(grad + start + width, dup, mask=inside)
        if MEASURES:
            most = tl.maximum(most, tl.abs(dgate.to(tl.float32)))
            most = tl.maximum(most, tl.abs(dup.to(tl.float32)))
    if MEASURES:
        tl.store(largest + tl.program_id(0), tl.max(most))
