"""transformer-engine's `DotProductAttention`, which picks a fused kernel of its own."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformer_engine.pytorch import DotProductAttention

from lightning_dhellam.kernels.attention.base import AutogradBackend, flash_window


class TransformerEngineAttention(AutogradBackend):
    """Takes grouped keys as they are; its backward is deterministic where torch has to be.

    Views of one tensor in which each group has several queries are none of the layouts that it
    knows: it copies them.
    """

    name = "transformer_engine"
    serves_once = True

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        out: Tensor = module_for(q, k, scale, "sbhd", "causal", window)(q, k, v)
        return out.flatten(2)


def module_for(
    q: Tensor, k: Tensor, scale: float, layout: str, mask: str, window: int | None = None
) -> Any:
    """Its module for queries [..., heads, D] and keys [..., groups, D] in one of its layouts."""
    # With flash-attn 4 installed, its version 2.20 calls that with the window (-1, 0). There -1
    # does not mean all tokens before, and the output is zeros. It looks up at its calls which
    # backends it may take, so it must find this at each.
    os.environ.setdefault("NVTE_FLASH_ATTN_V4", "0")
    # It looks up this when it is made, so there is one for either answer.
    ordered = torch.are_deterministic_algorithms_enabled()
    return _made(q.shape[-2], k.shape[-2], q.shape[-1], scale, layout, mask, ordered, window)


@cache
def _made(
    heads: int,
    groups: int,
    size: int,
    scale: float,
    layout: str,
    mask: str,
    ordered: bool,
    window: int | None,
) -> Any:
    # Left out, it makes of the mask that there is none.
    said = {} if window is None else {"window_size": flash_window(window)}
    return DotProductAttention(
        heads,
        size,
        num_gqa_groups=groups,
        attention_dropout=0.0,
        qkv_format=layout,
        attn_mask_type=mask,
        softmax_scale=scale,
        **said,
    )
