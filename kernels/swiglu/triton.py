"""Triton: each element is read and written once. Shapes: N rows, F columns of the result."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_dhellam.kernels.launch import blocks

_BLOCK = 2048


def forward(gate_up: Tensor) -> Tensor:
    """Compute what `reference.forward` does."""
    return _forward_of(gate_up, None)


def weighted_forward(gate_up: Tensor, weights: Tensor) -> Tensor:
    """Compute what `reference.weighted_forward` does."""
    return _forward_of(gate_up, weights.contiguous())


def backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """Compute what `reference.backward` does."""
    return _backward_of(dy, gate_up, None)[0]


def weighted_backward(dy: Tensor, gate_up: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what `reference.weighted_backward` does."""
    grad, partial = _backward_of(dy, gate_up, weights.contiguous())
    return grad, partial.sum(1)


def _forward_of(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    y = gate_up.new_empty((*gate_up.shape[:-1], width))
    across = blocks(width, _BLOCK)
    if y.numel():
        _forward[(y.numel() // width * across,)](
            gate_up, gate_up if weights is None else weights, y, width, across,
            WEIGHTED=weights is not None, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return y


def _backward_of(dy: Tensor, gate_up: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """The gradient, and those of the weights [N, blocks] by the blocks of each row."""
    dy, gate_up = dy.contiguous(), gate_up.contiguous()
    width = dy.shape[-1]
    grad = torch.empty_like(gate_up)
    across = blocks(width, _BLOCK)
    rows = dy.numel() // width
    count = 0 if weights is None else rows
    partial = torch.empty(count, across, dtype=torch.float32, device=dy.device)
    if rows:
        _backward[(rows * across,)](
            dy, gate_up, dy if weights is None else weights, grad, partial, width, across,
            WEIGHTED=weights is not None, BLOCK=_BLOCK, num_warps=4,
        )  # fmt: skip
    return grad, partial


@triton.jit
def _forward(
    gate_up: tl.tensor,
    weights: tl.tensor,
    y: tl.tensor,
    width: int,
    across: int,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    row = (program // across).to(tl.int64)
    columns = program % across * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    at_gate = gate_up + row * 2 * width + columns
    gate = tl.load(at_gate, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at_gate + width, mask=inside, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    if WEIGHTED:
        result *= tl.load(weights + row).to(tl.float32)
    tl.store(y + row * width + columns, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dy: tl.tensor,
    gate_up: tl.tensor,
    weights: tl.tensor,
    grad: tl.tensor,
    partial: tl.tensor,
    width: int,
    across: int,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    row = (program // across).to(tl.int64)
    columns = program % across * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    start = row * 2 * width + columns
    wide = tl.load(dy + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + start, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + start + width, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    if WEIGHTED:
        tl.store(partial + program, tl.sum(wide * gate * sigmoid * up))
        wide *= tl.load(weights + row).to(tl.float32)
    dgate = wide * up * sigmoid * (1 + gate * (1 - sigmoid))
    dup = wide * gate * sigmoid
    tl.store(grad + start, dgate.to(grad.dtype.element_ty), mask=inside)
    tl.store(grad + start + width, dup.to(grad.dtype.element_ty), mask=inside)
