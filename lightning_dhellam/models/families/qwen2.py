"""Qwen2 and Qwen2.5: Llama with biases of queries, keys and values."""

from __future__ import annotations

from lightning_dhellam.models.families.family import ONLY, PLAIN, Family, but_for, last_layers

QWEN2 = Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    has="RMSNorm, swiglu, rotary embedding, and biases of queries, keys and values only",
    fixed={**but_for(PLAIN, "sliding_window"), "qkv_bias": True},
    fields={
        "num_layers": ("num_hidden_layers", 32),
        "hidden_size": ("hidden_size", 4096),
        "ffn_hidden_size": ("intermediate_size", 22016),
        "num_attention_heads": ("num_attention_heads", 32),
        "vocab_size": ("vocab_size", 151936),
        "norm_epsilon": ("rms_norm_eps", 1e-6),
        "tie_embeddings": ("tie_word_embeddings", False),
        "num_query_groups": ("num_key_value_heads", 32),
    },
    only=ONLY,
    windows=last_layers,
)
