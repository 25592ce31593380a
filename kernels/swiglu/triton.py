"""Triton: each element is read and written once. Shapes: N rows, F columns of the result."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_dhellam.kernels.launch import blocks
from lightning_dhellam.kernels.swiglu.reference import weighted, weighted_backward

__all__ = ["backward", "forward", "weighted", "weighted_backward"]

_BLOCK = 2048


def forward(gate_up: Tensor) -> Tensor:
    """Compute what `reference.forward` does."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    y = gate_up.new_empty((*gate_up.shape[:-1], width))
    across = blocks(width, _BLOCK)
    grid = (gate_up.numel() // (2 * width) * across,)
    _forward[grid](gate_up, y, width, across, BLOCK=_BLOCK, num_warps=4)
    return y


def backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """Compute what `reference.backward` does."""
    dy, gate_up = dy.contiguous(), gate_up.contiguous()
    width = dy.shape[-1]
    grad = torch.empty_like(gate_up)
    across = blocks(width, _BLOCK)
    grid = (dy.numel() // width * across,)
    _backward[grid](dy, gate_up, grad, width, across, BLOCK=_BLOCK, num_warps=4)
    return grad


@triton.jit
def _forward(
    gate_up: tl.tensor, y: tl.tensor, width: int, across: int, BLOCK: tl.constexpr
) -> None:
    program = tl.program_id(0)
    row = (program // across).to(tl.int64)
    columns = program % across * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    at_gate = gate_up + row * 2 * width + columns
    gate = tl.load(at_gate, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(at_gate + width, mask=inside, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(y + row * width + columns, result.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dy: tl.tensor, gate_up: tl.tensor, grad: tl.tensor, width: int, across: int, BLOCK: tl.constexpr
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
    dgate = wide * up * sigmoid * (1 + gate * (1 - sigmoid))
    dup = wide * gate * sigmoid
    tl.store(grad + start, dgate.to(grad.dtype.element_ty), mask=inside)
    tl.store(grad + start + width, dup.to(grad.dtype.element_ty), mask=inside)
