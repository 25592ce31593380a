"""Plain torch: the ground truth, and the CPU path."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_dhellam.kernels.fp8.reference import largest
from lightning_dhellam.kernels.measured import measured
from lightning_dhellam.kernels.weighted import weighted


def forward(x: Tensor) -> Tensor:
    """`x` times the normal distribution function of `x` [...]."""
    return torch.nn.functional.gelu(x.float()).to(x.dtype)


def backward(dy: Tensor, x: Tensor) -> Tensor:
    """Gradient of `forward` by `x` [...], from `dy` [...]."""
    wide = x.float()
    below = 0.5 * (1 + torch.erf(wide * math.sqrt(0.5)))
    density = torch.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    return (dy.float() * (below + wide * density)).to(x.dtype)


weighted_forward, weighted_backward = weighted(forward, backward)
forward_measured, backward_measured = measured(forward, backward, largest)
