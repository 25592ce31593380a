"""How many weights a model has, and how many operations it takes: counted here alone.

Operations of attention depend on how long the sequences in use are, which is seldom as long as a
model accepts.
"""

from __future__ import annotations

from lightning_dhellam.kernels.attention.heads import Heads
from lightning_dhellam.models.config import ModelConfig

# Longer contexts are for inference, or for a last phase of training.
_TRAINING_LENGTH = 8192
_BYTE = 175
"""FLOPs that take a GPU as long as moving a byte."""


def parameter_count(config: ModelConfig) -> int:
    """Number of weights of the whole model, vocabulary padding not counted."""
    norm = config.hidden_size * (1 if config.normalization == "RMSNorm" else 2)
    layer = matrix_weights(config) + _biases(config) + 2 * norm
    tables = 1 if config.tie_embeddings else 2
    table = config.vocab_size * config.hidden_size
    return config.num_layers * layer + tables * table + norm


def matrix_weights(config: ModelConfig) -> int:
    """Weights of the matrices of one layer."""
    heads = heads_of(config)
    attention = heads.channels + heads.queries * heads.size
    return config.hidden_size * (attention + _mlp_matrices(config) * config.ffn_hidden_size)


def heads_of(config: ModelConfig) -> Heads:
    """The heads of a layer, on all ranks together."""
    groups = config.num_query_groups
    return Heads(groups, config.num_attention_heads // groups, config.kv_channels)


def training_flops_per_token(config: ModelConfig, length: int) -> float:
    """FLOPs of forward and backward per token of a sequence of `length`, attention causal-halved.

    Two for each weight of a matrix product in forward and twice that in backward; the embedding's
    look-up, biases and norms count nothing.
    """
    weights = config.num_layers * matrix_weights(config) + config.vocab_size * config.hidden_size
    attention = config.num_layers * heads_of(config).flops(length)
    return 6.0 * weights + 3.0 * attention


def costs_in_layers(config: ModelConfig) -> tuple[float, float]:
    """Time of the embedding, and of the output layer with the loss, in that of a layer.

    By matrix products and attention, over sequences as long as models are mostly trained on, since
    a split is made before there is a batch; the embedding by the 10 bytes per channel that it
    moves.
    """
    length = min(config.max_sequence_length, _TRAINING_LENGTH)
    layer = 6.0 * matrix_weights(config) + 3.0 * heads_of(config).flops(length)
    embedding = 10 * _BYTE * config.hidden_size
    return embedding / layer, 6.0 * config.vocab_size * config.hidden_size / layer


def _mlp_matrices(config: ModelConfig) -> int:
    """Matrices of hidden_size by ffn_hidden_size in the MLP of a layer."""
    return 3 if config.activation == "swiglu" else 2


def _biases(config: ModelConfig) -> int:
    """Biases of the linear layers of one layer."""
    qkv = heads_of(config).channels
    if not config.linear_bias:
        return qkv if config.qkv_bias else 0
    mlp = (_mlp_matrices(config) - 1) * config.ffn_hidden_size
    return qkv + mlp + 2 * config.hidden_size
