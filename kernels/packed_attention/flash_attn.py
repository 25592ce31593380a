"""flash-attn (Dao, arXiv 2307.08691) in its variable-length form, through its public function."""

from __future__ import annotations

import torch
from flash_attn import flash_attn_varlen_func
from torch import Tensor

from lightning_dhellam.kernels.attention.base import flash_window
from lightning_dhellam.kernels.packed_attention.base import AutogradPackedBackend, Runs


class PackedFlashAttention(AutogradPackedBackend):
    """Takes grouped keys as they are; its backward is deterministic where torch has to be."""

    name = "flash_attn"

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        runs: Runs,
        window: int | None = None,
    ) -> Tensor:
        out: Tensor = flash_attn_varlen_func(
            q,
            k,
            v,
            runs.queries,
            runs.keys,
            runs.longest,
            runs.longest,
            softmax_scale=scale,
            causal=True,
            window_size=flash_window(window),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        return out
