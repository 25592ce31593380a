"""flash-attn 4 (arXiv 2603.05451): kernels for Hopper and Blackwell, compiled when first called.

Its two halves are called without autograd. The package gives them no public names, and is a beta:
`pyproject.toml` pins the version that they were read in.
"""

from __future__ import annotations

from typing import Any

import torch
from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
from torch import Tensor

from lightning_dhellam.kernels.attention.base import Backend


class FlashAttention4(Backend):
    """Takes grouped keys as they are; its backward is deterministic where torch has to be."""

    name = "flash_attn_4"

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        *,
        causal: bool = True,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor, Any]:
        assert window is None, f"{self.name} takes no window"
        # Contiguous as it is returned, where the package would allocate [B, S, H, D].
        out = q.new_empty(q.shape)
        _, lse, *_ = _flash_attn_fwd(
            *_arranged(q, k, v),
            softmax_scale=scale,
            causal=causal,
            return_lse=True,
            out=out.transpose(0, 1),
        )
        return out.flatten(2), lse, None

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        state: Any,
        scale: float,
        *,
        causal: bool = True,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dout, out = (t.view(q.shape) for t in (dout, out))
        dq, dk, dv = _flash_attn_bwd(
            *_arranged(q, k, v, out, dout),
            lse,
            softmax_scale=scale,
            causal=causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return dq.transpose(0, 1), dk.transpose(0, 1), dv.transpose(0, 1)


def _arranged(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[S, B, heads, D] as the [B, S, heads, D] of the package, which takes any outer strides."""
    return tuple(t.transpose(0, 1) for t in tensors)
