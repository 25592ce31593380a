"""Plain torch: the ground truth, and the CPU path."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of `gate_up` [..., 2F], the gate first. Returns [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate_up.dtype)


def backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    """Gradient of `forward` by `gate_up` [..., 2F], from `dy` [..., F]."""
    gate, up = (half.float() for half in gate_up.chunk(2, dim=-1))
    wide = dy.float()
    sigmoid = torch.sigmoid(gate)
    dgate = wide * up * sigmoid * (1 + gate * (1 - sigmoid))
    dup = wide * gate * sigmoid
    return torch.cat([dgate, dup], dim=-1).to(gate_up.dtype)
