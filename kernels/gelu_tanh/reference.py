"""Plain torch: the ground truth, and the CPU path."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_dhellam.kernels.fp8.reference import largest
from lightning_dhellam.kernels.measured import measured
from lightning_dhellam.kernels.weighted import weighted

ROOT = math.sqrt(2 / math.pi)
CUBE = 0.044715


def forward(x: Tensor) -> Tensor:
    """`x` times a half of `1 + tanh(ROOT * (x + CUBE * x^3))` [...]."""
    return torch.nn.functional.gelu(x.float(), approximate="tanh").to(x.dtype)


def backward(dy: Tensor, x: Tensor) -> Tensor:
    """Gradient of `forward` by `x` [...], from `dy` [...]."""
    wide = x.float()
    square = wide * wide
    bent = torch.tanh(ROOT * wide * (1 + CUBE * square))
    slope = (1 - bent * bent) * ROOT * (1 + 3 * CUBE * square)
    return (dy.float() * 0.5 * (1 + bent + wide * slope)).to(x.dtype)


weighted_forward, weighted_backward = weighted(forward, backward)
forward_measured, backward_measured = measured(forward, backward, largest)
