"""transformer-engine's `DotProductAttention`, which picks a fused kernel of its own."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor
from transformer_engine.pytorch import DotProductAttention

from lightning_dhellam.kernels.attention.base import AutogradBackend


class TransformerEngineAttention(AutogradBackend):
    """Takes grouped keys as they are."""

    name = "transformer_engine"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        out: Tensor = _attention(q.shape[2], k.shape[2], q.shape[3], scale)(q, k, v)
        return out.flatten(2)


@cache
def _attention(heads: int, groups: int, size: int, scale: float) -> Any:
    return DotProductAttention(
        heads,
        size,
        num_gqa_groups=groups,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        softmax_scale=scale,
    )
