"""Published model shapes by name."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from lightning_dhellam.models.config import ModelConfig
from lightning_dhellam.values import suggestion

_LLAMA_3_8B = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=128256,
    max_sequence_length=8192,
)
_LLAMA_3_70B = replace(
    _LLAMA_3_8B, num_layers=80, hidden_size=8192, ffn_hidden_size=28672, num_attention_heads=64
)
_LLAMA_3_2_1B = ModelConfig(
    num_layers=16,
    hidden_size=2048,
    ffn_hidden_size=8192,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=128256,
    max_sequence_length=131072,
    rope_scaling_factor=32.0,
    tie_embeddings=True,
)

PRESETS: dict[str, ModelConfig] = {
    # Small enough for two CPU cores; every size divides by 4 ranks.
    "llama-tiny": ModelConfig(
        num_layers=4,
        hidden_size=256,
        ffn_hidden_size=768,
        num_attention_heads=8,
        num_query_groups=4,
        vocab_size=4096,
        max_sequence_length=1024,
        tie_embeddings=True,
    ),
    "llama-3.2-1b": _LLAMA_3_2_1B,
    "llama-3.2-3b": replace(_LLAMA_3_2_1B, num_layers=28, hidden_size=3072, num_attention_heads=24),
    "llama-3-8b": _LLAMA_3_8B,
    "llama-3.1-8b": replace(_LLAMA_3_8B, max_sequence_length=131072, rope_scaling_factor=8.0),
    "llama-3-70b": _LLAMA_3_70B,
    "llama-3.1-70b": replace(_LLAMA_3_70B, max_sequence_length=131072, rope_scaling_factor=8.0),
}


def preset(name: str, **overrides: Any) -> ModelConfig:
    """The preset ``name`` with some fields replaced, e.g. ``preset("llama-3-70b", num_layers=8)``.

    Raises ValueError for an unknown name or field, with the known ones.
    """
    if name not in PRESETS:
        raise ValueError(_unknown("preset", name, list(PRESETS)))
    known = [field.name for field in fields(ModelConfig)]
    for override in overrides:
        if override not in known:
            raise ValueError(_unknown(f"override of preset {name!r}", override, known))
    return replace(PRESETS[name], **overrides)


def _unknown(kind: str, value: str, known: list[str]) -> str:
    hint = suggestion(value, known) or "."
    return f"unknown {kind} {value!r}{hint} Known: {', '.join(known)}"
