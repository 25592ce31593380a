"""transformer-engine's `DotProductAttention` in its layout `thd`, which is one row of tokens."""

from __future__ import annotations

from torch import Tensor

from lightning_dhellam.kernels.attention.transformer_engine import module_for
from lightning_dhellam.kernels.packed_attention.base import AutogradPackedBackend, Runs


class PackedTransformerEngineAttention(AutogradPackedBackend):
    """Takes grouped keys as they are; its backward is deterministic where torch has to be."""

    name = "transformer_engine"
    serves_once = True

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        runs: Runs,
        window: int | None = None,
    ) -> Tensor:
        out: Tensor = module_for(q, k, scale, "thd", "padding_causal", window)(
            # It tells layouts apart by strides, and knows none of these views.
            *(t.contiguous() for t in (q, k, v)),
            cu_seqlens_q=runs.queries,
            cu_seqlens_kv=runs.keys,
            max_seqlen_q=runs.longest,
            max_seqlen_kv=runs.longest,
        )
        return out.unflatten(1, q.shape[1:])
