"""Megatron-core's routers, of a small size."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.versions import QUIET_FIELDS

CONTEXT = ParallelContext.single(torch.device("cpu"))
EXPERTS, SEQUENCE, BATCH, HIDDEN = 8, 12, 3, 16


def router_config(**fields: Any) -> TransformerConfig:
    """Of two experts in fp32 for each token, without losses, but for other `fields`."""
    return TransformerConfig(
        **{
            "num_layers": 1,
            "hidden_size": HIDDEN,
            "num_attention_heads": 1,
            "num_moe_experts": EXPERTS,
            "moe_ffn_hidden_size": 8,
            "moe_router_topk": 2,
            "moe_router_load_balancing_type": "none",
            "moe_router_dtype": "fp32",
            "add_bias_linear": False,
            **QUIET_FIELDS,
            **fields,
        }
    )


def make_router(config: TransformerConfig) -> TopKRouter:
    """A router of one rank."""
    with CONTEXT.megatron():
        return TopKRouter(config, CONTEXT.groups)
