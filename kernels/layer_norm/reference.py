"""Plain torch: the ground truth, and the CPU path. Statistics are in fp32."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Normalise the last dimension of `x` [..., H].

    Returns `y` [..., H] in the type of `x`, and mean and `rstd` [..., 2] in fp32.
    """
    wide = x.float()
    mean = wide.mean(-1, keepdim=True)
    centred = wide - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = centred * rstd * weight.float() + bias.float()
    return y.to(x.dtype), torch.cat([mean, rstd], dim=-1)


def residual_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Add `x` [..., H] to the residual stream and normalise the sum.

    Returns the sum, and `y` and the statistics of `forward` of it.
    """
    total = residual + x
    return total, *forward(total, weight, bias, eps)


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, statistics: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `forward`, with the gradient of the residual branch added.

    Returns `dx` [..., H] in the type of `x`, and `dweight` and `dbias` [H] in fp32.
    """
    mean, rstd = statistics.split(1, dim=-1)
    normal = (x.float() - mean) * rstd
    wide = dy.float()
    scaled = wide * weight.float()
    along = (scaled * normal).mean(-1, keepdim=True)
    dx = rstd * (scaled - scaled.mean(-1, keepdim=True) - normal * along)
    if residual is not None:
        dx = dx + residual.float()
    dweight, dbias = (t.flatten(0, -2).sum(0) for t in (wide * normal, wide))
    return dx.to(x.dtype), dweight, dbias
