"""The same mixtures of experts twice: ours and Hugging Face's, from one ModelConfig."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from lightning_dhellam.models import ModelConfig
from tests.models.llama import SMALL

ODD = replace(SMALL, vocab_size=53, head_dim=12, num_experts=4, rotary_base=1e4)
MIXTURES = {
    "mixtral": replace(ODD, ffn_hidden_size=20),
    "qwen3-moe": replace(
        ODD,
        num_layers=3,
        qk_norm=True,
        num_experts=6,
        experts_per_token=3,
        expert_ffn_hidden_size=14,
        moe_layer_freq=(1, 0, 1),
        tie_embeddings=True,
    ),
    "qwen3-moe-unscaled": replace(
        ODD, sliding_window=9, qk_norm=True, expert_ffn_hidden_size=14, router_pre_softmax=True
    ),
    # Phimoe takes no head_dim: hidden_size / num_attention_heads is 8.
    "phi-moe": replace(
        ODD,
        head_dim=None,
        ffn_hidden_size=22,
        normalization="LayerNorm",
        attention_bias=True,
        output_bias=True,
        router_scores="sparsemixer",
        # So that it makes a difference between few experts.
        router_jitter=0.2,
    ),
}
"""By the names of the families."""
MIXTURES["phi-moe-long"] = replace(
    MIXTURES["phi-moe"],
    attention_bias=False,
    output_bias=False,
    rope_short_factors=(1.0, 1.04, 1.2, 2.5),
    rope_long_factors=(1.02, 1.1, 3.0, 8.0),
    rope_original_length=SMALL.max_sequence_length,
    rope_magnitude=1.25,
)


def _rope(config: ModelConfig) -> dict[str, Any]:
    if config.rope_short_factors is None or config.rope_long_factors is None:
        return {"rope_type": "default", "rope_theta": config.rotary_base}
    return {
        "rope_type": "longrope",
        "rope_theta": config.rotary_base,
        "short_factor": list(config.rope_short_factors),
        "long_factor": list(config.rope_long_factors),
        "short_mscale": config.rope_magnitude,
        "long_mscale": config.rope_magnitude,
        "original_max_position_embeddings": config.rope_original_length,
    }


def hugging_face_mixture(config: ModelConfig, seed: int = 0) -> PreTrainedModel:
    """A model of the family of this shape with random weights, fp32, as in evaluation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _of(config)
        model.set_attn_implementation("eager")
        # The usual one takes rows of multiples of 16 bytes only.
        model.set_experts_implementation("eager")
        for name, parameter in model.named_parameters():
            # Norms and biases of their first values would hide a missing operation.
            if "norm" in name and name.endswith("weight"):
                torch.nn.init.uniform_(parameter.data, 0.5, 1.5)
            else:
                torch.nn.init.normal_(parameter.data, std=0.2)
    return model.eval()


def _of(config: ModelConfig) -> PreTrainedModel:
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.kv_channels,
        "max_position_embeddings": config.max_sequence_length,
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": _rope(config),
        "tie_word_embeddings": config.tie_embeddings,
        "num_experts_per_tok": config.experts_per_token,
    }
    if config.qk_norm:
        dense = [index for index, here in enumerate(config.expert_layers) if not here]
        return Qwen3MoeForCausalLM(
            Qwen3MoeConfig(
                **common,
                num_experts=config.num_experts,
                intermediate_size=config.ffn_hidden_size,
                moe_intermediate_size=config.expert_width,
                norm_topk_prob=not config.router_pre_softmax,
                mlp_only_layers=dense,
                attention_bias=config.attention_bias,
                use_sliding_window=config.sliding_window is not None,
                sliding_window=config.sliding_window,
            )
        )
    common |= {"sliding_window": config.sliding_window}
    common |= {"num_local_experts": config.num_experts, "intermediate_size": config.expert_width}
    if config.router_scores == "softmax":
        return MixtralForCausalLM(MixtralConfig(**common))
    return PhimoeForCausalLM(
        PhimoeConfig(
            **common,
            attention_bias=config.attention_bias,
            lm_head_bias=config.output_bias,
            router_jitter_noise=config.router_jitter,
        )
    )
