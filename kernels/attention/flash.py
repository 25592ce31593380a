"""flash-attn (Dao, arXiv 2307.08691) through its public function."""

from __future__ import annotations

import torch
from flash_attn import flash_attn_func
from torch import Tensor

from lightning_dhellam.kernels.attention.base import AutogradBackend, flash_window


class FlashAttention(AutogradBackend):
    """Takes grouped keys as they are; its backward is deterministic where torch has to be."""

    name = "flash_attn"

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        # Its layout is [B, S, heads, D], with any strides above the last dimension.
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        out = flash_attn_func(
            q,
            k,
            v,
            softmax_scale=scale,
            causal=True,
            window_size=flash_window(window),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return out.transpose(0, 1).flatten(2)
