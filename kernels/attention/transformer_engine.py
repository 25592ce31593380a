"""transformer-engine's `DotProductAttention`, which picks a fused kernel of its own."""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformer_engine.pytorch import DotProductAttention

from lightning_dhellam.kernels.attention.base import AutogradBackend, Recorded


class TransformerEngineAttention(AutogradBackend):
    """Takes grouped keys as they are; its backward is deterministic where torch has to be.

    Views of one tensor in which each group has several queries are none of the layouts that it
    knows: it copies them.
    """

    name = "transformer_engine"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        # With flash-attn 4 installed, its version 2.20 calls that with the window (-1, 0). There -1
        # does not mean all tokens before, and the output is zeros. It looks up at its calls which
        # backends it may take, so it must find this at each.
        os.environ.setdefault("NVTE_FLASH_ATTN_V4", "0")
        ordered = torch.are_deterministic_algorithms_enabled()
        out: Tensor = _attention(q.shape[2], k.shape[2], q.shape[3], scale, ordered)(q, k, v)
        return out.flatten(2)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        state: Recorded,
        scale: float,
        *,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if state.used:
            # Its graph serves once. Who times this waits for a forward as well, but no step does.
            _, _, state = self.forward(q, k, v, scale)
        return super().backward(dout, q, k, v, out, lse, state, scale)


@cache
def _attention(heads: int, groups: int, size: int, scale: float, ordered: bool) -> Any:
    # It looks up `ordered` when it is made, so there is one for either answer.
    return DotProductAttention(
        heads,
        size,
        num_gqa_groups=groups,
        attention_dropout=0.0,
        qkv_format="sbhd",
        attn_mask_type="causal",
        softmax_scale=scale,
    )
