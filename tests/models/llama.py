"""The same Llama twice: ours and Hugging Face's, from one ModelConfig."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_dhellam.models import ModelConfig

SMALL = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=64,
    max_sequence_length=64,
)


def hugging_face_llama(config: ModelConfig, seed: int = 0) -> LlamaForCausalLM:
    """A `LlamaForCausalLM` of this shape with random weights, fp32."""
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": config.rotary_base}
    if config.rope_scaling_factor is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": config.rope_scaling_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    llama_config = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_query_groups,
        head_dim=config.kv_channels,
        max_position_embeddings=131072,
        rms_norm_eps=config.norm_epsilon,
        rope_parameters=rope,
        tie_word_embeddings=config.tie_embeddings,
        # Weights of the usual 0.02 leave attention uniform, and errors in it unseen.
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(llama_config)
        model.set_attn_implementation("eager")
        # Norm weights of exactly one would hide a missing multiplication.
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.uniform_(parameter.data, 0.5, 1.5)
    return model


def token_losses(model: LlamaForCausalLM, tokens: Tensor, labels: Tensor, **told: Tensor) -> Tensor:
    """Loss of every token [B, S] by Hugging Face's model; ``labels`` are already shifted."""
    logits = model(tokens, **told).logits.float()
    return torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), labels, ignore_index=-100, reduction="none"
    )


def random_batch(config: ModelConfig, batch: int = 3, length: int = 64) -> tuple[Tensor, Tensor]:
    """Tokens and shifted labels [B, S], some of the labels ignored."""
    generator = torch.Generator().manual_seed(1)
    sequence = torch.randint(config.vocab_size, (batch, length + 1), generator=generator)
    tokens, labels = sequence[:, :-1].contiguous(), sequence[:, 1:].clone()
    labels[0, 3:6] = -100
    # The last real column borders on the padding.
    labels[1, 0] = config.vocab_size - 1
    return tokens, labels


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of the expected tensor."""
    return ((actual - expected).norm() / expected.norm()).item()
