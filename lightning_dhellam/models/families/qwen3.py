"""Qwen3: norms of each head's queries and keys, biases of attention if asked for."""

from __future__ import annotations

from lightning_dhellam.models.families.family import (
    ONLY,
    PLAIN,
    Family,
    but_for,
    last_layers,
)

QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    has="RMSNorm, swiglu, rotary embedding, and norms of each head's queries and keys",
    fixed={**but_for(PLAIN, "attention_bias", "sliding_window"), "qk_norm": True},
    fields={
        "num_layers": ("num_hidden_layers", 32),
        "hidden_size": ("hidden_size", 4096),
        "ffn_hidden_size": ("intermediate_size", 22016),
        "num_attention_heads": ("num_attention_heads", 32),
        "kv_channels": ("head_dim", 128),
        "vocab_size": ("vocab_size", 151936),
        "norm_epsilon": ("rms_norm_eps", 1e-6),
        "tie_embeddings": ("tie_word_embeddings", False),
        "num_query_groups": ("num_key_value_heads", 32),
        "attention_bias": ("attention_bias", False),
    },
    only=ONLY,
    windows=last_layers,
)
