"""Published model shapes by name."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from lightning_dhellam.models.config import ModelConfig
from lightning_dhellam.nearest import suggestion

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

_MOE_TINY = ModelConfig(
    num_layers=2,
    hidden_size=128,
    ffn_hidden_size=256,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=4096,
    max_sequence_length=1024,
    tie_embeddings=True,
    num_experts=8,
    experts_per_token=2,
    expert_ffn_hidden_size=128,
    aux_loss_coefficient=0.01,
)

_GPT_2 = ModelConfig(
    num_layers=12,
    hidden_size=768,
    ffn_hidden_size=3072,
    num_attention_heads=12,
    num_query_groups=12,
    vocab_size=50257,
    max_sequence_length=1024,
    normalization="LayerNorm",
    activation="gelu_tanh",
    position_embedding="learned",
    linear_bias=True,
    tie_embeddings=True,
    hidden_dropout=0.1,
    attention_dropout=0.1,
)


def _gpt(base: ModelConfig, layers: int, hidden: int, heads: int, **others: Any) -> ModelConfig:
    """Another size of a GPT, whose heads each have a key of their own."""
    return replace(
        base,
        num_layers=layers,
        hidden_size=hidden,
        ffn_hidden_size=4 * hidden,
        num_attention_heads=heads,
        num_query_groups=heads,
        **others,
    )


# All layers attend to all tokens; in the paper every second one sees only some.
_GPT_3 = replace(_GPT_2, max_sequence_length=2048, hidden_dropout=0.0, attention_dropout=0.0)

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
    "gpt2-tiny": _gpt(_GPT_2, 4, 256, 8, vocab_size=4096),
    "gpt2": _GPT_2,
    "gpt2-medium": _gpt(_GPT_2, 24, 1024, 16),
    "gpt2-large": _gpt(_GPT_2, 36, 1280, 20),
    "gpt2-xl": _gpt(_GPT_2, 48, 1600, 25),
    "gpt-3-6.7b": _gpt(_GPT_3, 32, 4096, 32),
    "gpt-3-175b": _gpt(_GPT_3, 96, 12288, 96),
    "llama-3.2-1b": _LLAMA_3_2_1B,
    "llama-3.2-3b": replace(_LLAMA_3_2_1B, num_layers=28, hidden_size=3072, num_attention_heads=24),
    "llama-3-8b": _LLAMA_3_8B,
    "llama-3.1-8b": replace(_LLAMA_3_8B, max_sequence_length=131072, rope_scaling_factor=8.0),
    "llama-3-70b": _LLAMA_3_70B,
    "llama-3.1-70b": replace(_LLAMA_3_70B, max_sequence_length=131072, rope_scaling_factor=8.0),
    "mistral-7b": ModelConfig(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
        vocab_size=32000,
        max_sequence_length=32768,
        rotary_base=10_000.0,
        sliding_window=4096,
    ),
    "qwen2.5-7b": ModelConfig(
        num_layers=28,
        hidden_size=3584,
        ffn_hidden_size=18944,
        num_attention_heads=28,
        num_query_groups=4,
        vocab_size=152064,
        max_sequence_length=32768,
        norm_epsilon=1e-6,
        rotary_base=1e6,
        qkv_bias=True,
    ),
    "qwen3-8b": ModelConfig(
        num_layers=36,
        hidden_size=4096,
        ffn_hidden_size=12288,
        num_attention_heads=32,
        num_query_groups=8,
        head_dim=128,
        vocab_size=151936,
        max_sequence_length=40960,
        norm_epsilon=1e-6,
        rotary_base=1e6,
        qk_norm=True,
    ),
    "phi-3-mini": ModelConfig(
        num_layers=32,
        hidden_size=3072,
        ffn_hidden_size=8192,
        num_attention_heads=32,
        num_query_groups=32,
        vocab_size=32064,
        max_sequence_length=4096,
        rotary_base=10_000.0,
        sliding_window=2047,
        family="phi3",
    ),
    "olmo-2-7b": ModelConfig(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=11008,
        num_attention_heads=32,
        num_query_groups=32,
        vocab_size=100352,
        max_sequence_length=4096,
        norm_epsilon=1e-6,
        qk_norm=True,
        qk_norm_whole=True,
        post_norm=True,
    ),
    # Small enough for two CPU cores; experts divide by 8 ranks, everything else by 2.
    "moe-tiny": _MOE_TINY,
    # As DeepSeek-V3 routes: the first layer dense, a shared expert, sigmoid scores in groups, and a
    # bias that balances the experts; with the attention of Llama.
    "deepseek-moe-tiny": replace(
        _MOE_TINY,
        num_layers=3,
        moe_layer_freq=(0, 1, 1),
        shared_expert_ffn_hidden_size=128,
        router_scores="sigmoid",
        router_scaling_factor=2.5,
        router_groups=4,
        router_groups_per_token=2,
        router_bias_update_rate=1e-3,
        aux_loss="seq_aux_loss",
        aux_loss_coefficient=1e-4,
    ),
    "mixtral-8x7b": ModelConfig(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=14336,
        num_attention_heads=32,
        num_query_groups=8,
        vocab_size=32000,
        max_sequence_length=32768,
        rotary_base=1e6,
        num_experts=8,
        experts_per_token=2,
        aux_loss_coefficient=0.01,  # Megatron-core's own, in its example of Mixtral
    ),
    "phi-3.5-moe": ModelConfig(
        num_layers=32,
        hidden_size=4096,
        ffn_hidden_size=6400,
        num_attention_heads=32,
        num_query_groups=8,
        vocab_size=32064,
        max_sequence_length=4096,
        rotary_base=10_000.0,
        normalization="LayerNorm",
        attention_bias=True,
        output_bias=True,
        num_experts=16,
        experts_per_token=2,
        router_scores="sparsemixer",
    ),
    "qwen3-30b-a3b": ModelConfig(
        num_layers=48,
        hidden_size=2048,
        ffn_hidden_size=6144,
        num_attention_heads=32,
        num_query_groups=4,
        head_dim=128,
        vocab_size=151936,
        max_sequence_length=40960,
        norm_epsilon=1e-6,
        rotary_base=1e6,
        qk_norm=True,
        num_experts=128,
        experts_per_token=8,
        expert_ffn_hidden_size=768,
        aux_loss_coefficient=0.001,  # as Megatron Bridge trains it
    ),
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
