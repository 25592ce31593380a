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


def weighted_forward(x: Tensor, weights: Tensor) -> Tensor:
    """`forward` of `x` [N, F], each row times its weight [N]. Rounded once."""
    return (forward(x.float()) * weights[:, None].float()).to(x.dtype)


def weighted_backward(dy: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `weighted_forward` by `x` [N, F] and, in fp32, by `weights` [N]."""
    wide, grad = x.float(), dy.float()
    d_weights = (grad * forward(wide)).sum(1)
    return backward(grad * weights[:, None].float(), wide).to(x.dtype), d_weights
