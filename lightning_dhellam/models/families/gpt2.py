"""GPT-2, and GPT-3 of the same layers: learned positions, LayerNorm, GELU and biases everywhere."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_dhellam.models.config import ModelConfig
from lightning_dhellam.models.families.family import Family, Found, Theirs
from lightning_dhellam.models.layout import GPT2_EMBEDDING, HEAD, gpt2_conversions

_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "gelu_python": "gelu",
}
"""What is computed by the names of Hugging Face."""

_PREFIX = "transformer."
_MASKS = (".attn.bias", ".attn.masked_bias")
"""Old files hold them; attention knows what is causal."""


def _more(theirs: Theirs) -> Found:
    inner, activation = theirs.get("n_inner"), theirs.get("activation_function", "gelu_new")
    width = 4 * theirs.get("n_embd", 768) if inner is None else inner
    return {
        "ffn_hidden_size": ("n_inner, or 4 times n_embd, of", width),
        "activation": (f"activation_function={activation!r}, that is", _activation(activation)),
    }


def _tells(own: ModelConfig) -> Theirs:
    return {
        "n_inner": own.ffn_hidden_size,
        "activation_function": "gelu" if own.activation == "gelu" else "gelu_new",
        "resid_pdrop": own.hidden_dropout,
        "embd_pdrop": own.dropout_of_embedding,
        "attn_pdrop": own.attention_dropout,
    }


def _activation(name: str) -> str:
    return _ACTIVATIONS.get(name, "gelu_tanh")


def _refuses(theirs: Theirs, own: ModelConfig) -> Iterator[str]:
    activation = theirs.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        known = " or ".join(map(repr, _ACTIVATIONS))
        yield f"activation_function={activation!r}, and only {known} can be expressed here"


def _lacks(config: ModelConfig) -> Iterator[str]:
    if config.activation == "swiglu":
        yield "activation='swiglu'"
    if config.num_query_groups != config.num_attention_heads:
        yield f"num_query_groups={config.num_query_groups}"
    if config.kv_channels * config.num_attention_heads != config.hidden_size:
        yield f"head_dim={config.head_dim}"


def _spelt(name: str) -> str | None:
    if name.endswith(_MASKS):
        return None
    # The files of the first models are those of `GPT2Model`, which has no head and no prefix.
    return name if name.startswith(_PREFIX) or name == HEAD else f"{_PREFIX}{name}"


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    has="LayerNorm, GELU, learned positions, a key for each query, and biases in all layers",
    fixed={
        "normalization": "LayerNorm",
        "position_embedding": "learned",
        "linear_bias": True,
        "output_bias": False,
        "qk_norm": False,
        "post_norm": False,
        "sliding_window": None,
    },
    fields={
        "num_layers": ("n_layer", 12),
        "hidden_size": ("n_embd", 768),
        "num_attention_heads": ("n_head", 12),
        "num_query_groups": ("n_head", 12),
        "vocab_size": ("vocab_size", 50257),
        "max_sequence_length": ("n_positions", 1024),
        "norm_epsilon": ("layer_norm_epsilon", 1e-5),
        "tie_embeddings": ("tie_word_embeddings", True),
    },
    # `reorder_and_upcast_attn` asks for what attention does here in any case: softmax in fp32.
    only={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "quantization_config": None,
    },
    more=_more,
    tells=_tells,
    refuses=_refuses,
    training={
        "hidden_dropout": ("resid_pdrop", 0.1),
        "embedding_dropout": ("embd_pdrop", 0.1),
        "attention_dropout": ("attn_pdrop", 0.1),
    },
    lacks=_lacks,
    table=gpt2_conversions,
    embedding=GPT2_EMBEDDING,
    spelt=_spelt,
)
