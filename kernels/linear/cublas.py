"""cuBLAS through torch: weight gradients of 16-bit operands are added to fp32 in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dhellam.kernels.linear import reference
from lightning_dhellam.kernels.linear.reference import (
    SHRINKS,
    accumulate_bias_grad,
    dgrad,
    forward,
)

__all__ = ["SHRINKS", "accumulate_bias_grad", "accumulate_wgrad", "dgrad", "forward"]


def accumulate_wgrad(grad: Tensor, dy: Tensor, x: Tensor, *, first: bool = False) -> None:
    """Compute what `reference.accumulate_wgrad` does, at full GEMM speed (measured on an H200)."""
    rows, columns = dy.flatten(0, -2).t(), x.flatten(0, -2)
    beta = 0 if first else 1
    if grad.dtype is dy.dtype:
        grad.addmm_(rows, columns, beta=beta)
    elif grad.dtype is not torch.float32:  # torch adds to no other type than that of the operands
        reference.accumulate_wgrad(grad, dy, x, first=first)
    else:
        torch.addmm(grad, rows, columns, beta=beta, out_dtype=grad.dtype, out=grad)
