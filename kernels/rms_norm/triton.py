"""Triton: see `kernels.norm`."""

from __future__ import annotations

from torch import Tensor

from lightning_dhellam.kernels import norm


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute what `reference.forward` does."""
    _, y, rstd = norm.forward(x, None, weight, None, eps)
    return y, rstd


def residual_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `reference.residual_forward` does."""
    return norm.forward(x, residual, weight, None, eps)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Compute what `reference.backward` does."""
    dx, (dweight,) = norm.backward(dy, x, weight, rstd, residual)
    return dx, dweight
