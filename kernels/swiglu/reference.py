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
    out = torch.empty_like(gate_up, dtype=torch.float32)
    dgate, dup = out.chunk(2, dim=-1)
    # Fewer passes over memory than the formula has operations: a CPU is limited by them.
    torch.ops.aten.silu_backward.grad_input(wide * up, gate, grad_input=dgate)
    torch.mul(wide, torch.nn.functional.silu(gate), out=dup)
    return out.to(gate_up.dtype)


def weighted(gate_up: Tensor, weights: Tensor) -> Tensor:
    """`forward` of rows `gate_up` [R, 2F], each times its weight [R] before it is rounded."""
    gate, up = gate_up.chunk(2, dim=-1)
    found = torch.nn.functional.silu(gate.float()) * up.float()
    return found.mul_(weights[:, None]).to(gate_up.dtype)


def weighted_backward(dy: Tensor, gate_up: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `weighted` by `gate_up` [R, 2F] and by `weights` [R], from `dy` [R, F]."""
    gate, up = (half.float() for half in gate_up.chunk(2, dim=-1))
    wide = dy.float()
    found = torch.nn.functional.silu(gate) * up
    by_weights = (wide * found).sum(-1)
    return backward(wide * weights[:, None], gate_up), by_weights
