"""The shape of a model, checked, and its translation to Megatron's configuration."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from lightning_dhellam.layers.mlp import gelu_tanh
from lightning_dhellam.models.experts import ExpertFields, as_kept, check_expert_shares
from lightning_dhellam.models.rotary_fields import RotaryFields
from lightning_dhellam.parallel.context import ParallelContext
from lightning_dhellam.values import check_fields
from lightning_dhellam.versions import QUIET_FIELDS

# Rows of the vocabulary that one rank's GEMM works on come in multiples of this many.
_VOCABULARY_ALIGNMENT = 8
_KINDS = {
    "normalization": ("RMSNorm", "LayerNorm"),
    "activation": ("swiglu", "gelu", "gelu_tanh"),
    "position_embedding": ("rope", "learned", "none"),
}

_ACTIVATIONS = {
    "swiglu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": gelu_tanh,
}


@dataclass(frozen=True)
class ModelConfig(ExpertFields, RotaryFields):
    """Shape and initialisation of one model; immutable, valid once constructed.

    A mixture of experts has the fields of `ExpertFields` as well, and rotary embedding those of
    `RotaryFields`.

    Raises ValueError, naming the field, when a value is of another kind than the field says, or the
    numbers do not fit together.
    """

    num_layers: int
    """Number of transformer layers."""

    hidden_size: int
    """Width of the residual stream."""

    ffn_hidden_size: int
    """Width of the MLP (Hugging Face: intermediate_size)."""

    num_attention_heads: int
    """Number of query heads."""

    num_query_groups: int
    """Number of key/value heads; each serves num_attention_heads / num_query_groups queries."""

    vocab_size: int
    """Number of tokens of the tokenizer; any number, padding for the hardware is added."""

    head_dim: int | None = None
    """Width of one attention head; hidden_size / num_attention_heads when left out."""

    max_sequence_length: int = 8192
    """Longest sequence, in tokens, that the model accepts."""

    norm_epsilon: float = 1e-5
    """Added to the mean square in every RMSNorm."""

    sliding_window: int | None = None
    """How many tokens each attends to, of itself and those before it; all when left out. One as
    wide as `max_sequence_length` is none."""

    window_layers: tuple[int, ...] | None = None
    """Which layers have the window: a list of a 1 (window) or a 0 (all tokens) for each layer; all
    of them when left out (Qwen2: max_window_layers)."""

    tie_embeddings: bool = False
    """Whether the output layer uses the embedding's weight."""

    hidden_dropout: float = 0.0
    """Dropout probability after the embedding, attention and MLP."""

    embedding_dropout: float | None = None
    """Dropout probability after the embedding, where it is another (Hugging Face: embd_pdrop)."""

    attention_dropout: float = 0.0
    """Dropout probability of the weights that attention gives to keys."""

    normalization: str = "RMSNorm"
    """`RMSNorm`, or `LayerNorm`, which has a bias."""

    activation: str = "swiglu"
    """Activation of the MLP: `swiglu`, which has a gate, or one that has none: `gelu`, or
    `gelu_tanh`, its approximation by tanh (Hugging Face: gelu_new)."""

    linear_bias: bool = False
    """Whether the linear layers of attention and MLP have biases."""

    qkv_bias: bool = False
    """Whether the query-key-value projection has a bias; with `linear_bias` it has one anyway."""

    attention_bias: bool = False
    """Whether both projections of attention have biases, though `linear_bias` gives none."""

    output_bias: bool = False
    """Whether the output layer has a bias (Hugging Face: lm_head_bias)."""

    qk_norm: bool = False
    """Whether each head's queries and keys pass through a norm of their own (Qwen3)."""

    qk_norm_whole: bool = False
    """Whether that norm is of all heads of a token together (OLMo-2)."""

    post_norm: bool = False
    """Whether norms are of what attention and MLP give, before it joins the residual stream
    (OLMo-2), not of what they read from it."""

    position_embedding: str = "rope"
    """`rope`, rotary position embedding; `learned`, a table with a row for each position; or
    `none`: then only the causal mask tells positions."""

    family: str | None = None
    """Which family of Hugging Face the weights go to, of several with such models (`model_type` of
    its `config.json`); the first of them when left out."""

    init_std: float = 0.02
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        self._check_kinds_and_ranges()
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not a multiple of "
                f"num_attention_heads={self.num_attention_heads}: change one, or set head_dim"
            )
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_query_groups={self.num_query_groups}: every group needs as many queries"
            )
        self.check_rotary(self.position_embedding, self.kv_channels)
        self._check_windows()
        self._check_norms()
        self.check_experts(self.num_layers)
        if self.num_experts is not None and self.linear_bias:
            raise ValueError(
                "linear_bias=True with num_experts: experts have no biases here; use"
                " attention_bias=True for those of attention"
            )

    def _check_kinds_and_ranges(self) -> None:
        check_fields(self)
        for name in ("moe_layer_freq", "rope_short_factors", "rope_long_factors", "window_layers"):
            object.__setattr__(self, name, as_kept(getattr(self, name)))
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in ("int", "int | None") and value is not None and value < 1:
                raise ValueError(f"{field.name}={value!r} must be at least 1")
        for name, known in _KINDS.items():
            if getattr(self, name) not in known:
                choices = " or ".join(map(repr, known))
                raise ValueError(f"{name}={getattr(self, name)!r} is not known: use {choices}")
        for name in ("hidden_dropout", "embedding_dropout", "attention_dropout"):
            p = getattr(self, name)
            if p is not None and not 0.0 <= p < 1.0:
                raise ValueError(f"{name}={p} must be in [0, 1)")
        for name in ("norm_epsilon", "rotary_base", "rope_magnitude", "init_std"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be greater than 0")

    def _check_windows(self) -> None:
        """Refuse a list of layers that have a window, where it does not fit."""
        layers = self.window_layers
        if self.attention_dropout and any(window is not None for window in self.windows):
            raise ValueError(
                f"attention_dropout={self.attention_dropout} with"
                f" sliding_window={self.sliding_window}: attention that drops weights has no"
                " window; leave one of them out"
            )
        if layers is None:
            return
        if self.sliding_window is None:
            raise ValueError(
                f"window_layers={layers} without sliding_window: give its width as well, or leave"
                " window_layers out"
            )
        if len(layers) != self.num_layers or not set(layers) <= {0, 1}:
            raise ValueError(
                f"window_layers={layers} must have a 1 (window) or a 0 (all tokens) for each of"
                f" num_layers={self.num_layers} layers"
            )

    def _check_norms(self) -> None:
        """Refuse norms in other places where what they would be of is not computed."""
        if self.qk_norm_whole and (not self.qk_norm or self.normalization != "RMSNorm"):
            raise ValueError(
                f"qk_norm_whole=True with qk_norm={self.qk_norm} and"
                f" normalization={self.normalization!r}: it is an RMSNorm of queries and keys; set"
                " qk_norm=True and normalization='RMSNorm'"
            )
        if not self.post_norm:
            return
        for name, given in {
            "linear_bias": self.linear_bias,
            "attention_bias": self.attention_bias,
            "num_experts": self.num_experts is not None,
        }.items():
            if given:
                raise ValueError(
                    f"post_norm=True with {name}={getattr(self, name)}: norms of what is added to"
                    " the residual stream are of dense layers without biases; leave one out"
                )

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer: None where tokens attend to all those before them."""
        width = self.sliding_window
        if width is None or width >= self.max_sequence_length:
            return (None,) * self.num_layers
        layers = self.window_layers or (1,) * self.num_layers
        return tuple(width if here else None for here in layers)

    @property
    def softmax_scale(self) -> float | None:
        """Factor on attention's scores; None where it is that of the heads' width alone."""
        if self.magnitude == 1.0:
            return None
        return float(self.magnitude**2 * self.kv_channels**-0.5)

    @property
    def dropout_of_embedding(self) -> float:
        """Dropout probability after the embedding."""
        return self.hidden_dropout if self.embedding_dropout is None else self.embedding_dropout

    @property
    def kv_channels(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def expert_layers(self) -> tuple[bool, ...]:
        """Whether each layer has experts."""
        return self.layers_with_experts(self.num_layers)

    @property
    def expert_width(self) -> int:
        """Width of one expert."""
        return self.expert_ffn_hidden_size or self.ffn_hidden_size

    def padded_vocab_size(self, tensor_parallel_size: int) -> int:
        """Rows of the embedding table: vocab_size rounded up so that every rank's share is whole
        and aligned."""
        multiple = _VOCABULARY_ALIGNMENT * tensor_parallel_size
        return -(-self.vocab_size // multiple) * multiple

    def validate(
        self,
        tensor_parallel_size: int,
        expert_parallel_size: int = 1,
        expert_tensor_parallel_size: int | None = None,
        context_parallel_size: int = 1,
    ) -> None:
        """Raise ValueError unless the model can be cut over so many ranks.

        Experts are cut over `tensor_parallel_size` where their own size is left out.
        """
        for name in (
            "num_attention_heads",
            "num_query_groups",
            "ffn_hidden_size",
            "shared_expert_ffn_hidden_size",
            "max_sequence_length",
        ):
            value = getattr(self, name)
            if name == "ffn_hidden_size" and all(self.expert_layers):
                continue  # no layer has an MLP of that width but its experts
            if value is not None and value % tensor_parallel_size:
                raise ValueError(
                    f"{name}={value} is not a multiple of "
                    f"tensor_parallel_size={tensor_parallel_size}: every rank holds an equal "
                    f"share; lower tensor_parallel_size or change {name}"
                )
        ranks = tensor_parallel_size
        if expert_tensor_parallel_size is not None:
            ranks = expert_tensor_parallel_size
        check_expert_shares(self, self.expert_width, expert_parallel_size, ranks)

    def transformer_config(
        self, context: ParallelContext, dtype: torch.dtype = torch.float32
    ) -> TransformerConfig:
        """Megatron's configuration of this model on ``context``, weights in ``dtype``."""
        topology = context.topology
        self.validate(topology.tp_size, topology.ep_size, topology.etp_size, topology.cp_size)
        on_cpu = context.device.type == "cpu"
        windows = self.windows
        width = next((window for window in windows if window is not None), None)
        return TransformerConfig(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_attention_heads,
            num_query_groups=self.num_query_groups,
            kv_channels=self.kv_channels,
            normalization=self.normalization,
            layernorm_epsilon=self.norm_epsilon,
            add_bias_linear=self.linear_bias,
            add_qkv_bias=self.qkv_bias or self.attention_bias,
            qk_layernorm=self.qk_norm,
            softmax_scale=self.softmax_scale,
            window_size=None if width is None else (width - 1, 0),
            window_attn_skip_freq=None if width is None else [int(w is not None) for w in windows],
            gated_linear_unit=self.activation == "swiglu",
            activation_func=_ACTIVATIONS[self.activation],
            hidden_dropout=self.hidden_dropout,
            attention_dropout=self.attention_dropout,
            init_method_std=self.init_std,
            tensor_model_parallel_size=topology.tp_size,
            context_parallel_size=topology.cp_size,
            expert_model_parallel_size=topology.ep_size,
            expert_tensor_parallel_size=topology.etp_size,
            sequence_parallel=topology.tp_size > 1,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            fp16=dtype == torch.float16,
            # On the CPU every rank draws the whole weight and keeps its share, so that the
            # initial model does not depend on the tensor-parallel size.
            use_cpu_initialization=on_cpu,
            # Megatron's fusions need extensions or a compiler; the operators fuse on their own.
            bias_activation_fusion=False,
            bias_dropout_fusion=False,
            masked_softmax_fusion=False,
            gradient_accumulation_fusion=False,
            apply_rope_fusion=False,
            **self.expert_fields(self.num_layers, self.expert_width),
            **QUIET_FIELDS,
        )
