"""Triton: see `kernels.norm`."""

from __future__ import annotations

from torch import Tensor

from lightning_dhellam.kernels import norm


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Compute what `reference.forward` does."""
    _, y, statistics = norm.forward(x, None, weight, bias, eps)
    return y, statistics


def residual_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `reference.residual_forward` does."""
    return norm.forward(x, residual, weight, bias, eps)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, statistics: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute what `reference.backward` does."""
    dx, (dweight, dbias) = norm.backward(dy, x, weight, statistics, residual)
    return dx, dweight, dbias
