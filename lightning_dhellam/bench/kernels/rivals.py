"""What else a user could run: torch's own functions, and Liger (liger-kernel) if it is installed.

Liger is compared where it does the same work. Its rotary embedding neither regroups heads nor
copies values, so it is left out. Its cross-entropy makes loss and gradient in one call that waits
for the device: it stands against our two, and against torch's.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

Call = Callable[..., Any]


def eager_calls() -> dict[str, Call]:
    """Torch's functions by the name of the benchmark's kernel, where the reference is not one.

    The references of the loss go through the rows in chunks and that of dropout draws its bits in
    64-bit integers: right as truth, unfair as a rival.
    """
    return {
        "dropout + residual": _dropout_add,
        "loss": _loss_statistics,
        "loss grad": _loss_grad,
        "loss with grad": _loss_with_grad,
    }


def _dropout_add(x: Tensor, residual: Tensor, p: float, key: int) -> Tensor:
    return residual + torch.nn.functional.dropout(x, p)


def _loss_statistics(logits: Tensor, labels: Tensor, first: int, valid: int) -> Tensor:
    wide = logits.float()
    top = wide.amax(dim=1)
    total = (wide - top[:, None]).exp().sum(dim=1)
    return torch.stack([top, total, wide.gather(1, labels[:, None]).squeeze(1)])


def _loss_grad(
    logits: Tensor, labels: Tensor, lse: Tensor, weights: Tensor, first: int, valid: int
) -> Tensor:
    wide = (logits.float() - lse[:, None]).exp()
    hit = torch.arange(valid, device=logits.device) == labels[:, None]
    return ((wide - hit.float()) * weights[:, None]).to(logits.dtype)


def _loss_with_grad(logits: Tensor, labels: Tensor, first: int, valid: int) -> Any:
    with torch.enable_grad():
        leaf = logits.detach().requires_grad_()
        loss = torch.nn.functional.cross_entropy(leaf.float(), labels)
        return loss, torch.autograd.grad(loss, leaf)


@cache
def liger_calls() -> dict[str, Call]:
    """Liger's functions by the name of the benchmark's kernel; none if Liger is not installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.ops import cross_entropy, fused_add_rms_norm, layer_norm, rms_norm, swiglu
    from liger_kernel.ops.utils import calculate_settings

    def norm_grad(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, residual: Tensor) -> Any:
        block, warps = calculate_settings(x.shape[-1])
        return fused_add_rms_norm.fused_add_rms_norm_backward(
            dy, residual, x, weight, rstd.view(-1), 0.0, 0, block, warps, 2, False
        )

    def loss_with_grad(logits: Tensor, labels: Tensor, first: int, valid: int) -> Any:
        leaf = logits.detach().requires_grad_()
        return cross_entropy.cross_entropy_forward(
            leaf, labels, None, -100, 0.0, 0.0, "mean", None, False
        )

    return {
        "rms_norm": lambda x, w, eps: rms_norm.rms_norm_forward(x, w, eps, 0.0, "llama", None),
        "residual + rms_norm": lambda x, r, w, eps: fused_add_rms_norm.fused_add_rms_norm_forward(
            x, r, w, eps, 0.0, "llama"
        ),
        "rms_norm grad": norm_grad,
        "layer_norm": layer_norm.layer_norm_forward,
        "loss with grad": loss_with_grad,
        "swiglu": swiglu.swiglu_fused_gate_up_forward,
        "swiglu grad": lambda dy, gate_up: swiglu.swiglu_fused_gate_up_backward(gate_up, dy),
    }
