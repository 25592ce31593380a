"""Phi-3.5-MoE: LayerNorm, biases of attention and the output layer, experts chosen in two steps.

What it draws in training, jitter of the router's input and which experts, is not drawn here.
"""

from __future__ import annotations

from lightning_dhellam.models.families.family import ONLY, PLAIN, ROUTED, Family, window
from lightning_dhellam.models.layout import Names

_FREE = ("attention_bias", "output_bias")
PHI_MOE = Family(
    model_type="phimoe",
    architecture="PhimoeForCausalLM",
    has="LayerNorm, swiglu, rotary embedding and two experts of a sparse mixer in every layer",
    fixed={
        **{name: value for name, value in (PLAIN | ROUTED).items() if name not in _FREE},
        "normalization": "LayerNorm",
        "router_scores": "sparsemixer",
    },
    fields={
        "num_layers": ("num_hidden_layers", 32),
        "hidden_size": ("hidden_size", 4096),
        "expert_width": ("intermediate_size", 6400),
        "num_attention_heads": ("num_attention_heads", 32),
        "vocab_size": ("vocab_size", 32064),
        "norm_epsilon": ("rms_norm_eps", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", False),
        "num_query_groups": ("num_key_value_heads", 8),
        "num_experts": ("num_local_experts", 16),
        "experts_per_token": ("num_experts_per_tok", 2),
        "router_jitter": ("router_jitter_noise", 0.01),
        "attention_bias": ("attention_bias", False),
        "output_bias": ("lm_head_bias", False),
    },
    only=ONLY,
    rotary_base=1e6,
    rope_types=("default",),
    experts=Names("block_sparse_moe", "gate", ("w1", "w3", "w2")),
    renamed=((".block_sparse_moe.gate.", ".mlp.router."), (".block_sparse_moe.", ".mlp.")),
    refuses=window,
)
