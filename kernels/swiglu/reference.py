"""Plain torch: the ground truth, and the CPU path."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dhellam.kernels.fp8.reference import largest
from lightning_dhellam.kernels.measured import measured


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


def weighted_forward(gate_up: Tensor, weights: Tensor) -> Tensor:
    """`forward` of `gate_up` [N, 2F], each row times its weight [N]. Rounded once."""
    return (forward(gate_up.float()) * weights[:, None].float()).to(gate_up.dtype)


def weighted_backward(dy: Tensor, gate_up: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `weighted_forward` by `gate_up` [N, 2F] and, in fp32, by `weights` [N]."""
    wide, grad = gate_up.float(), dy.float()
    d_weights = (grad * forward(wide)).sum(1)
    return backward(grad * weights[:, None].float(), wide).to(gate_up.dtype), d_weights


forward_measured, backward_measured = measured(forward, backward, largest)
