"""Torch's own ring attention, as the core attention of Megatron-core's model.

Megatron-core shares sequences by transformer-engine's attention only. Where that is missing, this
is the rival: torch's experimental context parallelism, whose ring hides under its own attention.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.autograd import Function
from torch.distributed import ProcessGroup
from torch.distributed.tensor.experimental._context_parallel import _attention as ring

from lightning_dhellam.models.attention import SdpaCoreAttention

_SEQUENCE = 2
"""The dimension of tokens in [B, heads, S, D]."""
aten = torch.ops.aten


class RingCoreAttention(SdpaCoreAttention):
    """Causal attention among the tokens of all context-parallel ranks, cut zigzag.

    Keys are sent from rank to rank while a rank attends to those it has.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._group = options["pg_collection"].cp
        ring.set_rotate_method("alltoall")

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """`query` [S, B, heads, D], `key` and `value` [S, B, groups, D] of this rank's tokens to
        [S, B, heads * D]."""
        assert attention_mask is None and attention_bias is None and packed_seq_params is None
        if not query.is_cuda:
            repeat = query.size(2) // key.size(2)
            key, value = (x.repeat_interleave(repeat, dim=2) for x in (key, value))
        scale = self.softmax_scale or query.size(-1) ** -0.5
        parts = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        context: Tensor = _Ring.apply(self._group, scale, *parts)
        return context.permute(2, 0, 1, 3).flatten(2)


class _Ring(Function):
    """Torch's functions around one kernel's operators: cuDNN's on a GPU, torch's own on a CPU."""

    @staticmethod
    def forward(
        ctx: Any, group: ProcessGroup, scale: float, query: Tensor, key: Tensor, value: Tensor
    ) -> Tensor:
        """Tensors are [B, heads, S, D]."""
        if query.is_cuda:
            forward = aten._scaled_dot_product_cudnn_attention
            options = {"attn_bias": None, "compute_log_sumexp": True, "return_debug_mask": False}
        else:
            forward, options = aten._scaled_dot_product_flash_attention_for_cpu, {}
        out, lse, *rest = ring._templated_ring_attention(
            group,
            _SEQUENCE,
            forward,
            query,
            key,
            value,
            is_causal=True,
            dropout_p=0.0,
            scale=scale,
            **options,
        )
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.group, ctx.scale, ctx.rest = group, scale, rest
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Gradients by queries, keys and values."""
        query, key, value, out, lse = ctx.saved_tensors
        options: dict[str, Any] = {}
        if query.is_cuda:
            backward = aten._scaled_dot_product_cudnn_attention_backward.default
            names = ("cum_seq_q", "cum_seq_k", "max_q", "max_k", "philox_seed", "philox_offset")
            options = dict(zip(names, ctx.rest, strict=False)) | {"attn_bias": None}
        else:
            backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        dq, dk, dv, *_ = ring._templated_ring_attention_backward(
            ctx.group,
            _SEQUENCE,
            backward,
            grads[0].contiguous(),
            "grad_out",
            query,
            key,
            value,
            out,
            lse,
            is_causal=True,
            dropout_p=0.0,
            scale=ctx.scale,
            **options,
        )
        return None, None, dq, dk, dv
