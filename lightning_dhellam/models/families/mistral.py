"""Mistral: Llama with a sliding window."""

from __future__ import annotations

from lightning_dhellam.models.families.family import ONLY, PLAIN, Family, Theirs, Windows, but_for


def _windows(theirs: Theirs, layers: int) -> Windows:
    return (theirs.get("sliding_window", 4096),) * layers


MISTRAL = Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    has="RMSNorm, swiglu and rotary embedding only, one window in all layers, and no biases",
    fixed={**but_for(PLAIN, "sliding_window"), "window_layers": None},
    fields={
        "num_layers": ("num_hidden_layers", 32),
        "hidden_size": ("hidden_size", 4096),
        "ffn_hidden_size": ("intermediate_size", 14336),
        "num_attention_heads": ("num_attention_heads", 32),
        "vocab_size": ("vocab_size", 32000),
        "norm_epsilon": ("rms_norm_eps", 1e-6),
        "tie_embeddings": ("tie_word_embeddings", False),
        "num_query_groups": ("num_key_value_heads", 8),
    },
    only=ONLY,
    windows=_windows,
)
