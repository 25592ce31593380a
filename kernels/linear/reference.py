"""Plain torch: the ground truth, and the CPU path."""

from __future__ import annotations

import torch
from torch import Tensor

SHRINKS = True
"""Its GEMMs on CUDA are cuBLAS's."""


def forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x` [..., I] times `weight` [O, I] transposed, plus `bias` [O]. Returns [..., O]."""
    return torch.nn.functional.linear(x, weight, bias)


def dgrad(dy: Tensor, weight: Tensor) -> Tensor:
    """Gradient by the input [..., I] from `dy` [..., O]."""
    return dy.matmul(weight)


def accumulate_wgrad(grad: Tensor, dy: Tensor, x: Tensor, *, first: bool = False) -> None:
    """Add `dy` [..., O] transposed times `x` [..., I] to `grad` [O, I], in place.

    The operands are taken in the type of `grad`, in which the sum is. When it is the `first` of a
    step, what `grad` holds is overwritten without being read.
    """
    rows, columns = dy.flatten(0, -2).t(), x.flatten(0, -2)
    grad.addmm_(rows.to(grad.dtype), columns.to(grad.dtype), beta=0 if first else 1)


def accumulate_bias_grad(grad: Tensor, dy: Tensor, *, first: bool = False) -> None:
    """Add the sum of the rows of `dy` [..., O] to `grad` [O], in place and in its type.

    When it is the `first` of a step, what `grad` holds is overwritten without being read.
    """
    total = dy.flatten(0, -2).sum(0, dtype=grad.dtype)
    if first:
        grad.copy_(total)
    else:
        grad.add_(total)
