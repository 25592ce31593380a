"""How many weights a model has, and how many operations it takes: counted here alone.

Operations of attention depend on how long the sequences in use are, which is seldom as long as a
model accepts.
"""

from __future__ import annotations

import torch

from lightning_dhellam.kernels.attention.heads import Heads
from lightning_dhellam.models.config import ModelConfig
from lightning_dhellam.plan import Lane

# Longer contexts are for inference, or for a last phase of training.
_TRAINING_LENGTH = 8192
_BYTE = 175
"""FLOPs that take a GPU as long as moving a byte."""


def parameter_count(config: ModelConfig) -> int:
    """Number of weights of the whole model, vocabulary padding not counted."""
    return _parameters(config, config.num_experts or 0)


def active_parameter_count(config: ModelConfig) -> int:
    """Number of weights that one token meets: of its experts, and all others."""
    return _parameters(config, _chosen(config))


def heads_of(config: ModelConfig) -> Heads:
    """The heads of a layer, on all ranks together."""
    groups = config.num_query_groups
    return Heads(groups, config.num_attention_heads // groups, config.kv_channels)


def crossing_bytes(config: ModelConfig, dtype: torch.dtype, tokens: int) -> dict[Lane, int]:
    """Bytes that lanes carry at a time of so many tokens, on all ranks together.

    Of `cp` they are a layer's keys and values, of `pp` the hidden states between two layers.
    """
    each = tokens * dtype.itemsize
    return {
        Lane.CP: 2 * each * config.num_query_groups * config.kv_channels,
        Lane.PP: each * config.hidden_size,
    }


def training_flops_per_token(config: ModelConfig, length: int, *, frozen: bool = False) -> float:
    """FLOPs of forward and backward per token of a sequence of `length`, attention causal-halved.

    Two for each weight of a matrix product in forward and twice that in backward, of those experts
    only that a token goes to; the embedding's look-up, biases and norms count nothing.
    """
    layers = sum(_matrices(config, experts, _chosen(config)) for experts in config.expert_layers)
    heads = heads_of(config)
    attention = sum(heads.flops(length, window) for window in config.windows)
    each = 4.0 if frozen else 6.0
    return each * (layers + config.vocab_size * config.hidden_size) + 3.0 * attention


def costs_in_layers(config: ModelConfig) -> tuple[float, float]:
    """Time of the embedding, and of the output layer with the loss, in that of a layer.

    By matrix products and attention, over sequences as long as models are mostly trained on, since
    a split is made before there is a batch; the embedding by the 10 bytes per channel that it
    moves. Where dense layers lie between those with experts, a layer is the mean of them.
    """
    length = min(config.max_sequence_length, _TRAINING_LENGTH)
    head = 6.0 * config.vocab_size * config.hidden_size
    layer = (training_flops_per_token(config, length) - head) / config.num_layers
    embedding = 10 * _BYTE * config.hidden_size
    return embedding / layer, head / layer


def _parameters(config: ModelConfig, experts: int) -> int:
    """Weights of the model, `experts` counted in each layer that has them."""
    norm = config.hidden_size * _per_norm(config)
    layers = sum(
        _matrices(config, here, experts) + _biases(config, here) for here in config.expert_layers
    )
    heads = _head_norms(config)
    tables = 1 if config.tie_embeddings else 2
    table = config.vocab_size * config.hidden_size
    bias = config.vocab_size if config.output_bias else 0
    if config.position_embedding == "learned":
        bias += config.max_sequence_length * config.hidden_size
    return layers + config.num_layers * (2 * norm + heads) + tables * table + bias + norm


def _matrices(config: ModelConfig, has_experts: bool, experts: int) -> int:
    """Weights of the matrices of one layer, `experts` counted if it has any."""
    heads = heads_of(config)
    attention = heads.channels + heads.queries * heads.size
    width = _mlp_matrices(config) * config.ffn_hidden_size
    if has_experts:
        widths = experts * config.expert_width + (config.shared_expert_ffn_hidden_size or 0)
        width = _mlp_matrices(config) * widths + (config.num_experts or 0)  # and the router
    return config.hidden_size * (attention + width)


def _chosen(config: ModelConfig) -> int:
    """Experts of a token in a layer."""
    return 0 if config.num_experts is None else config.experts_per_token


def _per_norm(config: ModelConfig) -> int:
    """Parameters of a norm for each channel."""
    return 1 if config.normalization == "RMSNorm" else 2


def _head_norms(config: ModelConfig) -> int:
    """Parameters of the norms of queries and keys in one layer."""
    if not config.qk_norm:
        return 0
    both = config.num_attention_heads + config.num_query_groups if config.qk_norm_whole else 2
    return both * config.kv_channels * _per_norm(config)


def _mlp_matrices(config: ModelConfig) -> int:
    """Matrices of hidden_size by ffn_hidden_size in the MLP of a layer."""
    return 3 if config.activation == "swiglu" else 2


def _biases(config: ModelConfig, has_experts: bool) -> int:
    """Biases of the linear layers of one layer; experts have none."""
    qkv = heads_of(config).channels
    both = config.linear_bias or config.attention_bias
    attention = (qkv if both or config.qkv_bias else 0) + (config.hidden_size if both else 0)
    if has_experts or not config.linear_bias:
        return attention
    return attention + (_mlp_matrices(config) - 1) * config.ffn_hidden_size + config.hidden_size
