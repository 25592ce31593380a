"""Causal attention through torch's fused kernels: Megatron's own stores the [S, S] scores.

A layer with a window is given the mask, which such kernels take [S, S] numbers for; operators have
kernels that need none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from lightning_dhellam.kernels.attention.sdpa import in_window
from lightning_dhellam.layers.fields import window_of


class SdpaCoreAttention(nn.Module):
    """``core_attention`` of a Megatron layer spec; grouped queries.

    The mask is causal, in layers with a window (`layers.fields.window_of`) within that. With
    `shrinking` queries and keys are multiplied by it first, a number for each channel of a head.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        shrinking: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        unsupported = {
            f"attn_mask_type={attn_mask_type.name}": attn_mask_type is not AttnMaskType.causal,
            f"softmax_type={config.softmax_type!r}": config.softmax_type != "vanilla",
            "apply_query_key_layer_scaling": config.apply_query_key_layer_scaling,
        }
        for name, present in unsupported.items():
            if present:
                raise ValueError(f"{name} is not supported by SdpaCoreAttention: causal only")
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale
        self.dropout = dropout
        self.window = window_of(config, layer_number)
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.shrinking = None if shrinking is None else torch.tensor(shrinking, device=device)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """``query`` [S, B, heads, D], ``key`` and ``value`` [S, B, groups, D] to
        [S, B, heads * D]. The mask is causal; ``attention_mask`` [B, 1, S, S] is true where a
        query does not see a key, and says all of it but the window."""
        assert attention_bias is None and packed_seq_params is None
        if self.shrinking is not None:
            query, key = (x * self.shrinking.to(x.dtype) for x in (query, key))
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        seen = None if attention_mask is None else ~attention_mask
        if self.window is not None and self.window < len(query[0, 0]):
            length = len(query[0, 0])
            inside = in_window(length, length, self.window, query.device)
            seen = inside if seen is None else seen & inside
        context = torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=seen,
            is_causal=seen is None,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        return context.permute(2, 0, 1, 3).flatten(2)
