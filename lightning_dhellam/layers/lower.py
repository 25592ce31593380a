"""From a container of Megatron-core modules to the graphs of its layers, first to last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer

from lightning_dhellam.kernels import rope
from lightning_dhellam.kernels.choose import Kernels, choose
from lightning_dhellam.layers.embedding import lower_embedding
from lightning_dhellam.layers.generic import lower_module
from lightning_dhellam.layers.head import HeadLowering, Loss
from lightning_dhellam.layers.rotary import RotaryTable
from lightning_dhellam.layers.transfer import connect
from lightning_dhellam.layers.transformer import TransformerLowering
from lightning_dhellam.layers.writer import Sizes
from lightning_dhellam.pipeline.stage import Stage
from lightning_dhellam.plan import Graph, GraphPair

SUPPORTED: dict[str, tuple[Any, ...]] = {
    "activation_func": (torch.nn.functional.silu, torch.nn.functional.gelu),
    "activation_func_clamp_value": (None,),
    "add_bias_linear": (False,),
    "add_qkv_bias": (False,),
    "apply_query_key_layer_scaling": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "attention_dropout": (0.0,),
    "attention_output_gate": (False,),
    "context_parallel_size": (1,),
    "cpu_offloading": (False,),
    "experimental_attention_variant": (None,),
    "fp4": (None,),
    "fp8": (None,),
    "fp32_residual_connection": (False,),
    "gated_linear_unit": (True, False),
    "glu_linear_offset": (0.0,),
    "heterogeneous_block_specs": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "linear_attention_freq": (None,),
    "moe_layer_freq": (1,),
    "mtp_num_layers": (None,),
    "multi_latent_attention": (False,),
    "no_rope_freq": (None,),
    "normalization": ("RMSNorm", "LayerNorm"),
    "num_moe_experts": (None,),
    "pipeline_model_parallel_size": (1,),
    "qk_clip": (False,),
    "qk_l2_norm": (False,),
    "qk_layernorm": (False,),
    "recompute_granularity": (None,),
    "rotary_interleaved": (False,),
    "softmax_scale": (None,),
    "softmax_type": ("vanilla",),
    "window_size": (None,),
}
"""Values of TransformerConfig that lowering reproduces. Everything else is refused by name."""


@dataclass(frozen=True)
class Lowered:
    """Graphs of a whole model.

    Attributes:
        layers: embedding, every layer, head; forward from first to last. With pipeline parallelism
            those of this rank's chunk, then those of its fold.
        logits: the head's graph for prediction, forward only; None on a stage without head.
        kernels: what computes the operators.
        stage: this rank's place in the pipeline.
    """

    layers: tuple[GraphPair, ...]
    logits: Graph | None
    kernels: Kernels
    stage: Stage


def check_supported(config: Any) -> None:
    """Refuse a TransformerConfig that lowering would silently compute otherwise.

    Raises:
        ValueError: naming the field, its value and what is supported.
    """
    for name, allowed in SUPPORTED.items():
        value = getattr(config, name, allowed[0])
        if value not in allowed:
            shown = " or ".join(getattr(v, "__name__", repr(v)) for v in allowed)
            raise ValueError(
                f"TransformerConfig.{name}={getattr(value, '__name__', repr(value))} cannot be"
                f" lowered to operators: use {shown}"
            )
    silu, gated = config.activation_func is torch.nn.functional.silu, config.gated_linear_unit
    if silu != gated:
        raise ValueError(
            f"TransformerConfig.gated_linear_unit={gated} with activation_func="
            f"{config.activation_func.__name__} cannot be lowered to operators: use silu with a"
            " gate, or gelu without one"
        )


def lower(
    model: Any,
    *,
    regather: bool | Callable[[int], bool] = True,
    loss: Loss | None = None,
    kernels: Mapping[str, str] | None = None,
) -> Lowered:
    """Lower a `models.CausalLM`.

    Args:
        model: the container; its modules' weights are read and their `main_grad` accumulated.
        regather: gather the input of column-parallel linears again in backward (less memory)
            instead of keeping it; for all layers, or decided by layer index.
        loss: a custom loss, or None for the vocabulary-parallel cross-entropy.
        kernels: backends to use by operator, such as `{attention: flash_attn}`; the others are
            chosen by device, type and what is installed.

    Raises:
        ValueError: the configuration or a layer cannot be lowered, a backend not be used, or no
            operator would train a parameter.
    """
    config = model.transformer_config
    check_supported(config)
    sizes = Sizes(model.context, config.params_dtype, config.hidden_size)
    chosen = choose(sizes.context.device, sizes.dtype, kernels, config.kv_channels)
    rotary = RotaryTable(model.rotary, model.config.max_sequence_length)
    again = regather if callable(regather) else lambda index: regather

    def lowered(chunk: int) -> list[GraphPair]:
        return [
            _lower_layer(layer, sizes, chosen, rotary, again(index), index)
            for index, layer in model.own_layers(chunk)
        ]

    topology = sizes.context.topology
    early, late = topology.pp_rank, 2 * topology.pp_size - 1 - topology.pp_rank
    falling, rising, logits = lowered(early), lowered(late), None
    if topology.pp_rank == 0:
        words = model.embedding.word_embeddings
        head = _head(model, sizes, chosen, again(len(model.layers)), loss)
        falling.insert(0, lower_embedding(words, sizes, chosen, config.hidden_dropout))
        rising.append(head.lower())
        logits = head.lower_logits()
    if topology.pp_size > 1:
        falling = connect(falling, early, sizes)
        rising = connect(rising, late, sizes)
        if logits is not None and len(rising) == 1:
            logits = replace(logits, receives=rising[0].forward.receives)
    layers = (*falling, *rising)
    _check_trained(model, layers)
    stage = Stage(topology.pp_rank, topology.pp_size, len(layers), len(falling))
    return Lowered(layers, logits, chosen, stage)


def _check_trained(model: torch.nn.Module, layers: Sequence[GraphPair]) -> None:
    """Refuse a parameter that waits for a gradient which no operator computes."""
    operators = (operator for pair in layers for operator in pair.backward.operators)
    trained = {id(parameter) for operator in operators for parameter in operator.accumulates}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in trained:
            raise ValueError(
                f"parameter '{name}' requires a gradient, but no layer uses it, so it would never"
                " be trained: use it in a layer of model.layers, or freeze it with"
                " requires_grad_(False)"
            )


def _head(
    model: Any, sizes: Sizes, kernels: Kernels, regather: bool, loss: Loss | None
) -> HeadLowering:
    vocab_size = model.config.vocab_size
    norm, weight = model.final_norm, model.output_weight
    return HeadLowering(norm, weight, vocab_size, sizes, kernels, regather, loss)


def _lower_layer(
    layer: Any, sizes: Sizes, kernels: Kernels, rotary: RotaryTable, regather: bool, index: int
) -> GraphPair:
    if type(layer) is TransformerLayer:
        return _transformer(layer, sizes, kernels, rotary, regather, index).lower()
    if isinstance(layer, MegatronModule):
        raise ValueError(
            f"layer {index} is a Megatron-core {type(layer).__name__}, which has no lowering: use a"
            " TransformerLayer, or a torch.nn.Module of your own, which runs as one operator"
        )
    return lower_module(layer, sizes, index)


def _transformer(
    layer: Any, sizes: Sizes, kernels: Kernels, rotary: RotaryTable, regather: bool, index: int
) -> TransformerLowering:
    attn = layer.self_attention
    groups = attn.num_query_groups_per_partition
    heads = rope.Heads(
        groups,
        attn.num_attention_heads_per_partition // groups,
        attn.hidden_size_per_attention_head,
    )
    return TransformerLowering(layer, sizes, heads, rotary, kernels, regather, index)
