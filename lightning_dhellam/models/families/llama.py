"""Llama: dense, without biases."""

from __future__ import annotations

from lightning_dhellam.models.families.family import ONLY, PLAIN, Family

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    has="RMSNorm, swiglu and rotary embedding only, and no biases here",
    fixed=PLAIN,
    fields={
        "num_layers": ("num_hidden_layers", 32),
        "hidden_size": ("hidden_size", 4096),
        "ffn_hidden_size": ("intermediate_size", 11008),
        "num_attention_heads": ("num_attention_heads", 32),
        "vocab_size": ("vocab_size", 32000),
        "norm_epsilon": ("rms_norm_eps", 1e-6),
        "tie_embeddings": ("tie_word_embeddings", False),
        "num_query_groups": ("num_key_value_heads", None),
    },
    only={**ONLY, "attention_bias": False, "mlp_bias": False},
)
