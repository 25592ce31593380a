"""flash-attn 3 (arXiv 2407.08608), kernels for Hopper, through its public function."""

from __future__ import annotations

import torch
from flash_attn_interface import flash_attn_func
from torch import Tensor

from lightning_dhellam.kernels.attention.base import AutogradBackend, flash_window


class FlashAttention3(AutogradBackend):
    """Takes grouped keys as they are; its backward is deterministic where torch has to be."""

    name = "flash_attn_3"

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        # Its layout is [B, S, heads, D], with any strides above the last dimension.
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        found = flash_attn_func(
            q,
            k,
            v,
            softmax_scale=scale,
            causal=True,
            window_size=flash_window(window),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        # Early betas give the log-sum-exp as well.
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out.transpose(0, 1).flatten(2)
