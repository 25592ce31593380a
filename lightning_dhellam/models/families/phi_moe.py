"""Phi-3.5-MoE: LayerNorm, biases of attention and the output layer, experts chosen in two steps.

What it draws in training, jitter of the router's input and which experts, is not drawn here.
"""

from __future__ import annotations

from collections.abc import Iterator

from lightning_dhellam.models.config import ModelConfig
from lightning_dhellam.models.families.family import (
    ONLY,
    PLAIN,
    ROUTED,
    Family,
    Found,
    Theirs,
    all_layers,
    but_for,
)
from lightning_dhellam.models.families.rope import LONG, rope_of, rope_type
from lightning_dhellam.models.layout import MixtureNames


def _more(theirs: Theirs) -> Found:
    rope = rope_of(theirs)
    said = rope if rope_type(rope) == LONG else {}
    return {"magnitude": ("short_mscale", said.get("short_mscale", 1.0))}


def _tells(own: ModelConfig) -> Theirs:
    if own.rope_short_factors is None or own.rope_long_factors is None:
        return {}
    first = own.rope_original_length
    scaling = {
        "rope_type": LONG,
        "rope_theta": own.rotary_base,
        "short_factor": list(own.rope_short_factors),
        "long_factor": list(own.rope_long_factors),
        "short_mscale": own.magnitude,
        "long_mscale": own.magnitude,
        "original_max_position_embeddings": first,
    }
    return {"rope_parameters": scaling, "original_max_position_embeddings": first}


def _refuses(theirs: Theirs, own: ModelConfig) -> Iterator[str]:
    rope = rope_of(theirs)
    if rope.get("short_mscale") != rope.get("long_mscale"):
        yield (
            f"short_mscale={rope.get('short_mscale')} and long_mscale={rope.get('long_mscale')} of"
            " its rope scaling, and only equal ones can be expressed here"
        )


PHI_MOE = Family(
    model_type="phimoe",
    architecture="PhimoeForCausalLM",
    has="LayerNorm, swiglu, rotary embedding and two experts of a sparse mixer in every layer",
    fixed={
        **but_for(PLAIN | ROUTED, "attention_bias", "output_bias", "sliding_window"),
        "normalization": "LayerNorm",
        "window_layers": None,
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
    rope_types=("default", LONG),
    experts=MixtureNames("block_sparse_moe", "gate", ("w1", "w3", "w2")),
    renamed=((".block_sparse_moe.gate.", ".mlp.router."), (".block_sparse_moe.", ".mlp.")),
    windows=all_layers,
    more=_more,
    tells=_tells,
    refuses=_refuses,
)
