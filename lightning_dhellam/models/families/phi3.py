"""Phi-3 and Phi-4-mini: Llama with fused projections, windows, and heads that may turn in part."""

from __future__ import annotations

from lightning_dhellam.models.config import ModelConfig
from lightning_dhellam.models.families.family import ONLY, PLAIN, Family, all_layers, but_for
from lightning_dhellam.models.families.rope import (
    LONG,
    ORIGINAL,
    Theirs,
    long_magnitude,
    rope_told,
)
from lightning_dhellam.models.layout import fused_conversions


def _tells(own: ModelConfig) -> Theirs:
    first = own.rope_original_length or own.max_sequence_length
    rope = rope_told(own)
    if own.magnitude == long_magnitude(own.max_sequence_length / first, first):
        rope.pop("attention_factor", None)
    return {
        "resid_pdrop": own.hidden_dropout,
        "embd_pdrop": own.dropout_of_embedding,
        ORIGINAL: first,
        # That of its own tokenizer, when left out, which other vocabularies need not have.
        "pad_token_id": None,
        "rope_parameters": rope,
    }


def _in_4(scaling: Theirs) -> Theirs:
    """Three fields: all else follows from what is said beside them, unless it is another."""
    if "attention_factor" in scaling or "factor" in scaling:
        return scaling
    return {"type": LONG, **{name: scaling[name] for name in ("short_factor", "long_factor")}}


PHI3 = Family(
    model_type="phi3",
    architecture="Phi3ForCausalLM",
    has="RMSNorm, swiglu and rotary embedding only, one window in all layers, and no biases",
    fixed={**but_for(PLAIN, "sliding_window", "rotary_fraction"), "window_layers": None},
    fields={
        "num_layers": ("num_hidden_layers", 32),
        "hidden_size": ("hidden_size", 3072),
        "ffn_hidden_size": ("intermediate_size", 8192),
        "num_attention_heads": ("num_attention_heads", 32),
        "vocab_size": ("vocab_size", 32064),
        "norm_epsilon": ("rms_norm_eps", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", False),
        "num_query_groups": ("num_key_value_heads", None),
    },
    only=but_for(ONLY, "partial_rotary_factor"),
    rope_types=("default", LONG),
    windows=all_layers,
    tells=_tells,
    in_4=_in_4,
    training={"hidden_dropout": ("resid_pdrop", 0.0), "embedding_dropout": ("embd_pdrop", 0.0)},
    table=fused_conversions,
)
