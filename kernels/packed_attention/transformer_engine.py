"""transformer-engine's `DotProductAttention` in its layout `thd`, which is one row of tokens."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformer_engine.pytorch import DotProductAttention

from lightning_dhellam.kernels.packed_attention.base import AutogradPackedBackend, Runs


class PackedTransformerEngineAttention(AutogradPackedBackend):
    """Takes grouped keys as they are; its backward is deterministic where torch has to be."""

    name = "transformer_engine"
    serves_once = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, runs: Runs) -> Tensor:
        # See `attention.transformer_engine`.
        os.environ.setdefault("NVTE_FLASH_ATTN_V4", "0")
        ordered = torch.are_deterministic_algorithms_enabled()
        attention = _attention(q.shape[1], k.shape[1], q.shape[2], scale, ordered)
        out: Tensor = attention(
            # It tells layouts apart by strides, and knows none of these views.
            *(t.contiguous() for t in (q, k, v)),
            cu_seqlens_q=runs.queries,
            cu_seqlens_kv=runs.keys,
            max_seqlen_q=runs.longest,
            max_seqlen_kv=runs.longest,
        )
        return out.unflatten(1, q.shape[1:])


@cache
def _attention(heads: int, groups: int, size: int, scale: float, ordered: bool) -> Any:
    # It looks up `ordered` when it is made, so there is one for either answer.
    return DotProductAttention(
        heads,
        size,
        num_gqa_groups=groups,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal",
        softmax_scale=scale,
    )
