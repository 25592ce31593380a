"""Qwen3-MoE: norms of queries and keys, many small experts, dense layers between if asked for."""

from __future__ import annotations

from lightning_dhellam.models.config import ModelConfig
from lightning_dhellam.models.families.family import (
    ONLY,
    PLAIN,
    ROUTED,
    Family,
    Found,
    Theirs,
    all_layers_if_used,
    but_for,
)
from lightning_dhellam.models.layout import MixtureNames


def _more(theirs: Theirs) -> Found:
    step, dense = theirs.get("decoder_sparse_step", 1), theirs.get("mlp_only_layers") or ()
    experts = tuple(
        layer not in dense and (layer + 1) % step == 0
        for layer in range(theirs.get("num_hidden_layers", 24))
    )
    number = theirs.get("num_experts", theirs.get("num_local_experts", 128))
    renormalised = theirs.get("norm_topk_prob", False)
    return {
        "expert_layers": ("decoder_sparse_step and mlp_only_layers give expert_layers", experts),
        "num_experts": ("num_experts", number),
        "router_pre_softmax": ("norm_topk_prob of false, that is", not renormalised),
    }


def _tells(own: ModelConfig) -> Theirs:
    return {
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, here in enumerate(own.expert_layers) if not here],
        "num_experts": own.num_experts,
        "norm_topk_prob": not own.router_pre_softmax,
    }


QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    has="RMSNorm, swiglu, rotary embedding, norms of queries and keys, and softmax over experts",
    fixed={
        **but_for(PLAIN | ROUTED, "attention_bias", "router_pre_softmax", "sliding_window"),
        "qk_norm": True,
        "window_layers": None,
    },
    fields={
        "num_layers": ("num_hidden_layers", 24),
        "hidden_size": ("hidden_size", 2048),
        "ffn_hidden_size": ("intermediate_size", 6144),
        "expert_width": ("moe_intermediate_size", 768),
        "num_attention_heads": ("num_attention_heads", 32),
        "vocab_size": ("vocab_size", 151936),
        "norm_epsilon": ("rms_norm_eps", 1e-6),
        "tie_embeddings": ("tie_word_embeddings", False),
        "num_query_groups": ("num_key_value_heads", 4),
        "experts_per_token": ("num_experts_per_tok", 8),
        "attention_bias": ("attention_bias", False),
    },
    only=ONLY,
    experts=MixtureNames(),
    dense_layers=True,
    more=_more,
    windows=all_layers_if_used,
    tells=_tells,
)
