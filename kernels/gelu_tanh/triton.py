"""Triton: each element is read and written once.

Half of `1 + tanh(u)` is the logistic function of `2u`, which takes one exponential.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lightning_dhellam.kernels.fp8.casts import largest_of_parts
from lightning_dhellam.kernels.gelu_tanh.reference import (
    CUBE,
    ROOT,
    weighted_backward,
    weighted_forward,
)
from lightning_dhellam.kernels.launch import each_element
from lightning_dhellam.kernels.measured import measured

__all__ = [
    "backward",
    "backward_measured",
    "forward",
    "forward_measured",
    "weighted_backward",
    "weighted_forward",
]

_TWICE = tl.constexpr(2 * ROOT)
_CUBE = tl.constexpr(CUBE)


def forward(x: Tensor) -> Tensor:
    """Compute what `reference.forward` does."""
    return each_element(_forward, x)


def backward(dy: Tensor, x: Tensor) -> Tensor:
    """Compute what `reference.backward` does."""
    return each_element(_backward, dy, x)


forward_measured, backward_measured = measured(forward, backward, largest_of_parts)


@triton.jit
def _forward(x: tl.tensor, y: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr) -> None:
    here = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = here < size
    wide = tl.load(x + here, mask=inside, other=0.0).to(tl.float32)
    share = _logistic(wide * (1.0 + wide * wide * _CUBE) * _TWICE)
    tl.store(y + here, (wide * share).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dy: tl.tensor, x: tl.tensor, dx: tl.tensor, size: tl.tensor, BLOCK: tl.constexpr
) -> None:
    here = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = here < size
    wide = tl.load(x + here, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + here, mask=inside, other=0.0).to(tl.float32)
    square = wide * wide
    share = _logistic(wide * (1.0 + square * _CUBE) * _TWICE)
    slope = share * (1.0 - share) * (1.0 + square * _CUBE * 3.0) * _TWICE
    result = grad * (share + wide * slope)
    tl.store(dx + here, result.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _logistic(x: tl.tensor) -> tl.tensor:
    return 1.0 / (1.0 + tl.exp(-x))
