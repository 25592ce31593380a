"""Plain torch: the ground truth, and the CPU path."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def forward(x: Tensor) -> Tensor:
    """`x` times the normal distribution function of `x` [...]."""
    return torch.nn.functional.gelu(x.float()).to(x.dtype)


def backward(dy: Tensor, x: Tensor) -> Tensor:
    """Gradient of `forward` by `x` [...], from `dy` [...]."""
    wide = x.float()
    below = 0.5 * (1 + torch.erf(wide * math.sqrt(0.5)))
    density = torch.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    return (dy.float() * (below + wide * density)).to(x.dtype)


def weighted(x: Tensor, weights: Tensor) -> Tensor:
    """`forward` of rows `x` [R, F], each times its weight [R] before it is rounded."""
    return (torch.nn.functional.gelu(x.float()) * weights[:, None]).to(x.dtype)


def weighted_backward(dy: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `weighted` by `x` [R, F] and by `weights` [R], from `dy` [R, F]."""
    wide = dy.float()
    by_weights = (wide * torch.nn.functional.gelu(x.float())).sum(-1)
    return backward(wide * weights[:, None], x), by_weights
