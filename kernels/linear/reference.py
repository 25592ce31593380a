"""cuBLAS through torch on CUDA, torch on CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor, weight: Tensor) -> Tensor:
    """`x` [..., I] times `weight` [O, I] transposed. Returns [..., O]."""
    return torch.nn.functional.linear(x, weight)


def dgrad(dy: Tensor, weight: Tensor) -> Tensor:
    """Gradient by the input [..., I] from `dy` [..., O]."""
    return dy.matmul(weight)


def accumulate_wgrad(grad: Tensor, dy: Tensor, x: Tensor, *, first: bool = False) -> None:
    """Add `dy` [..., O] transposed times `x` [..., I] to `grad` [O, I], in place.

    When it is the `first` of a step, what `grad` holds is overwritten without being read.
    With 16-bit operands and an fp32 `grad` the sum is in fp32: one cuBLAS call on CUDA (full GEMM
    speed, measured on an H200), fp32 operands on CPU, which has no such GEMM.
    """
    rows = dy.flatten(0, -2).t()
    columns = x.flatten(0, -2)
    beta = 0 if first else 1
    if grad.dtype is dy.dtype:
        grad.addmm_(rows, columns, beta=beta)
    elif grad.is_cuda:
        torch.addmm(grad, rows, columns, beta=beta, out_dtype=grad.dtype, out=grad)
    else:
        grad.addmm_(rows.to(grad.dtype), columns.to(grad.dtype), beta=beta)
