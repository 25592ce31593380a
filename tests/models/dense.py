"""The same dense models twice: ours and Hugging Face's, from one ModelConfig."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from lightning_dhellam.models import ModelConfig
from lightning_dhellam.models.families import family_of
from lightning_dhellam.models.families.rope import rope_told
from tests.models.llama import SMALL

# Three heads to a group, channels that are no power of two, and an odd vocabulary.
ODD = replace(
    SMALL,
    num_layers=4,
    hidden_size=36,
    ffn_hidden_size=22,
    num_attention_heads=6,
    num_query_groups=2,
    vocab_size=53,
    rotary_base=1e4,
)
GPT2 = replace(
    ODD,
    num_query_groups=ODD.num_attention_heads,
    rotary_base=SMALL.rotary_base,
    normalization="LayerNorm",
    activation="gelu_tanh",
    position_embedding="learned",
    linear_bias=True,
    embedding_dropout=0.0,
)
DENSE = {
    "mistral": replace(ODD, sliding_window=5),
    "mistral-whole": replace(
        ODD,
        family="mistral",
        head_dim=12,
        rope_scaling="yarn",
        rope_scaling_factor=4.0,
        rope_original_length=16,
        rope_beta_fast=3.0,
        rope_truncate=False,
    ),
    "qwen2": replace(ODD, qkv_bias=True, tie_embeddings=True),
    "qwen2-last-layers": replace(
        ODD, qkv_bias=True, sliding_window=3, window_layers=(0, 0, 1, 1), num_query_groups=6
    ),
    "qwen3": replace(
        ODD, head_dim=10, qk_norm=True, rope_scaling="linear", rope_scaling_factor=3.0
    ),
    "qwen3-biased": replace(ODD, head_dim=4, qk_norm=True, attention_bias=True),
    # Batches are longer than what it was trained on first, so that the second factors hold.
    "phi3-long": replace(
        ODD,
        rotary_fraction=0.75,
        rope_short_factors=(1.0, 1.5),
        rope_long_factors=(1.25, 8.0),
        rope_original_length=16,
        rope_magnitude=1.5**0.5,
        tie_embeddings=True,
        embedding_dropout=0.0,
    ),
    "olmo2": replace(ODD, qk_norm=True, qk_norm_whole=True, post_norm=True),
    "phi3": replace(ODD, family="phi3", sliding_window=7, embedding_dropout=0.0),
    "gpt2": replace(GPT2, tie_embeddings=True),
    "gpt2-exact": replace(GPT2, activation="gelu", ffn_hidden_size=144),
}
"""By their families, and what is particular."""


def configuration_of(config: ModelConfig) -> PreTrainedConfig:
    """The configuration of transformers with this shape."""
    family = family_of(config).model_type
    said: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "max_position_embeddings": config.max_sequence_length,
        "rms_norm_eps": config.norm_epsilon,
        "rope_parameters": rope_told(config),
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.attention_bias,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if config.sliding_window is not None:
        said |= {"sliding_window": config.sliding_window, "use_sliding_window": True}
        layers = config.window_layers or (1,) * config.num_layers
        said["max_window_layers"] = layers.index(1)
    elif family in ("mistral", "phi3"):
        said["sliding_window"] = None
    if config.head_dim is not None:
        said["head_dim"] = config.head_dim
    if config.rope_short_factors is not None:
        said["original_max_position_embeddings"] = config.rope_original_length
    if family == "gpt2":
        said |= {
            "n_inner": config.ffn_hidden_size,
            "activation_function": "gelu_new" if config.activation == "gelu_tanh" else "gelu",
            "resid_pdrop": config.hidden_dropout,
            "embd_pdrop": config.dropout_of_embedding,
            "attn_pdrop": config.attention_dropout,
        }
    return AutoConfig.for_model(family, **said)


def hugging_face_dense(config: ModelConfig, seed: int = 0) -> PreTrainedModel:
    """A model of the family of this shape with random weights, fp32, as in evaluation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(configuration_of(config))
        model.set_attn_implementation("eager")
        for name, parameter in model.named_parameters():
            # Norms and biases of their first values would hide a missing operation.
            if "norm" in name or ".ln_" in name:
                torch.nn.init.uniform_(parameter.data, 0.5, 1.5)
            else:
                torch.nn.init.normal_(parameter.data, std=0.2)
    return model.eval()
