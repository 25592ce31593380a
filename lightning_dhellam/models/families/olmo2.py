"""OLMo-2: norms of what blocks give, and of all heads' queries and keys together."""

from __future__ import annotations

from lightning_dhellam.models.families.family import ONLY, PLAIN, Family

OLMO2 = Family(
    model_type="olmo2",
    architecture="Olmo2ForCausalLM",
    has="RMSNorm after attention and MLP and of all queries and keys, swiglu, and no biases",
    fixed={**PLAIN, "qk_norm": True, "qk_norm_whole": True, "post_norm": True},
    fields={
        "num_layers": ("num_hidden_layers", 32),
        "hidden_size": ("hidden_size", 4096),
        "ffn_hidden_size": ("intermediate_size", 11008),
        "num_attention_heads": ("num_attention_heads", 32),
        "vocab_size": ("vocab_size", 50304),
        "norm_epsilon": ("rms_norm_eps", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", False),
        "num_query_groups": ("num_key_value_heads", None),
    },
    only={**ONLY, "attention_bias": False},
)
