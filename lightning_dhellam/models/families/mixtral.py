"""Mixtral: Llama with experts in every layer."""

from __future__ import annotations

from lightning_dhellam.models.families.family import (
    ONLY,
    PLAIN,
    ROUTED,
    Family,
    all_layers,
    but_for,
)
from lightning_dhellam.models.layout import MixtureNames

MIXTRAL = Family(
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    has="RMSNorm, swiglu, rotary embedding and softmax over the chosen experts in every layer",
    fixed={**but_for(PLAIN | ROUTED, "sliding_window"), "window_layers": None},
    fields={
        "num_layers": ("num_hidden_layers", 32),
        "hidden_size": ("hidden_size", 4096),
        "expert_width": ("intermediate_size", 14336),
        "num_attention_heads": ("num_attention_heads", 32),
        "vocab_size": ("vocab_size", 32000),
        "norm_epsilon": ("rms_norm_eps", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", False),
        "num_query_groups": ("num_key_value_heads", 8),
        "num_experts": ("num_local_experts", 8),
        "experts_per_token": ("num_experts_per_tok", 2),
    },
    only={**ONLY, "router_jitter_noise": 0.0},
    rotary_base=1e6,
    experts=MixtureNames("block_sparse_moe", "gate", ("w1", "w3", "w2")),
    renamed=((".block_sparse_moe.", ".mlp."),),
    windows=all_layers,
)
