"""Plain torch: the ground truth, and the CPU path. Statistics are in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalise the last dimension of `x` [..., H].

    Returns `y` [..., H] in the type of `x`, and `rstd` [..., 1] in fp32.
    """
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * rstd * weight.float()).to(x.dtype), rstd


def residual_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Add `x` [..., H] to the residual stream and normalise the sum.

    Returns the sum, and `y` and `rstd` of `forward` of it.
    """
    total = residual + x
    return total, *forward(total, weight, eps)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Gradients of `forward`, with the gradient of the residual branch added.

    Returns `dx` [..., H] in the type of `x`, and `dweight` [H] in fp32.
    """
    normal = x.float() * rstd
    wide = dy.float()
    scaled = wide * weight.float()
    dx = rstd * (scaled - normal * (scaled * normal).mean(-1, keepdim=True))
    if residual is not None:
        dx = dx + residual.float()
    dweight = (wide * normal).flatten(0, -2).sum(0)
    return dx.to(x.dtype), dweight
