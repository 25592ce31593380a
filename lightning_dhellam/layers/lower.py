"""From a container of Megatron-core modules to the graphs of its layers, first to last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import TransformerLayer

from lightning_dhellam.kernels.choose import Kernels, choose
from lightning_dhellam.layers import linear, norm
from lightning_dhellam.layers.block import Setting, check_config
from lightning_dhellam.layers.embedding import lower_embedding
from lightning_dhellam.layers.fields import check_unknown
from lightning_dhellam.layers.fp8_formats import Fp8
from lightning_dhellam.layers.generic import lower_module
from lightning_dhellam.layers.head import HeadLowering, Loss
from lightning_dhellam.layers.host_memory import HostMemory
from lightning_dhellam.layers.linear import ColumnLinear
from lightning_dhellam.layers.norm import Norm
from lightning_dhellam.layers.rotary import RotaryTable
from lightning_dhellam.layers.tied import lower_tied
from lightning_dhellam.layers.transfer import connect
from lightning_dhellam.layers.transformer import CHECKED, lower_transformer
from lightning_dhellam.layers.travelling import Travelling
from lightning_dhellam.layers.ways import WAYS
from lightning_dhellam.layers.writer import Sizes
from lightning_dhellam.pipeline.schedules import Scheme, fold
from lightning_dhellam.pipeline.stage import Stage
from lightning_dhellam.plan import Ends, Graph, GraphPair, check_chain
from lightning_dhellam.plan.by_layer import HEAD, USUAL, ByLayer, choices_of, remade
from lightning_dhellam.plan.layout import Held
from lightning_dhellam.plan.offloading import Offload, of_layer
from lightning_dhellam.plan.offloading import offload as offloaded
from lightning_dhellam.plan.passes import Recompute

LAYERS: dict[type, Callable[[Any, Setting], GraphPair]] = {TransformerLayer: lower_transformer}
"""What lowers a layer, by the class of its Megatron-core module."""


@dataclass(frozen=True)
class Lowered:
    """Graphs of a whole model.

    Attributes:
        layers: embedding, every layer, head; forward from first to last. With pipeline parallelism
            those of this rank's chunks.
        logits: the head's graph for prediction, forward only; None on a stage without head.
        kernels: what computes the operators.
        stage: this rank's place in the pipeline.
        slots: that its layers and head have in forward: those that backward can make again.
        keys: by which `recompute` names each of `layers`; nothing where it cannot.
        ends: what a step has beside its layers.
        host: memory in which offloaded slots wait; None where there are none.
    """

    layers: tuple[GraphPair, ...]
    logits: Graph | None
    kernels: Kernels
    stage: Stage
    slots: frozenset[str]
    keys: tuple[str, ...]
    ends: Ends
    host: HostMemory | None = None

    @property
    def inputs(self) -> frozenset[str]:
        """Slots that its layers are handed in forward."""
        return frozenset(slot for pair in self.layers for slot in pair.forward.inputs)


def lower(
    model: Any,
    *,
    recompute: Recompute | ByLayer = USUAL,
    offload: Offload = None,
    loss: Loss | None = None,
    kernels: Mapping[str, str] | None = None,
    context_exchange: str = "ring",
    context_fp32_gradients: bool = True,
    context_fp8_keys: bool = False,
    scheme: Scheme = fold,
    fp8: str | None = None,
    fp8_all_gather: bool = False,
) -> Lowered:
    """Lower a `models.CausalLM`.

    Args:
        model: the container; its modules' weights are read and their `main_grad` accumulated.
        recompute: what backward makes again in place of keeping it (see `plan.passes`), for all
            layers or by layer (see `plan.by_layer`).
        offload: what of that which is saved waits for backward in host memory (see
            `plan.offloading`).
        loss: a custom loss, or None for the vocabulary-parallel cross-entropy.
        kernels: backends to use by operator, such as `{attention: flash_attn}`; the others are
            chosen by device, type and what is installed.
        context_exchange: how keys come to the ranks that share sequences: `ring` or `all_gather`.
        context_fp32_gradients: whether gradients by them travel in fp32, or as activations.
        context_fp8_keys: whether keys and values travel in 8 bits, but for layers with a window.
        scheme: makes the schedule of a step.
        fp8: how the linear layers compute in 8 bits, of `fp8_formats.FORMATS`; None where they do
            not. Embedding, head, norms and attention do not in any case.
        fp8_all_gather: whether what these layers gather travels in 8 bits.

    Raises:
        ValueError: the configuration or a layer cannot be lowered, a backend not be used, no
            operator would train a parameter, or operators do not agree about how slots lie.
    """
    config = model.transformer_config
    check_unknown(config, CHECKED)
    sizes = Sizes(
        model.context, config.params_dtype, config.hidden_size, model.config.max_sequence_length
    )
    topology = sizes.context.topology
    ranks = topology.cp_size
    rotary = None if model.rotary is None else RotaryTable(model.rotary, ranks)
    chosen = choose(
        sizes.context.device,
        sizes.dtype,
        kernels,
        config.kv_channels,
        in_blocks=ranks > 1,
        in_window=any(window is not None for window in model.config.windows),
    )
    eight = Fp8.of(fp8, chosen, sizes.context.device, sizes.dtype, kernels, fp8_all_gather)
    way = None
    if ranks > 1:
        gradients = torch.float32 if context_fp32_gradients else sizes.dtype
        travelling = Travelling(sizes.dtype, context_fp8_keys)
        way = WAYS[context_exchange](topology.cp_rank, ranks, gradients, travelling)
    wanted = choices_of(recompute, model.chunks, model.chunk_count)
    slots: set[str] = set()
    host = HostMemory(sizes.context.device) if offload else None

    def recomputed(pair: GraphPair, what: Recompute, key: str) -> GraphPair:
        slots.update(pair.forward.written)
        made = remade(pair, what)
        if host is None:
            return made
        return offloaded(made, of_layer(offload, key), host.away, host.back)

    def lowered(chunk: int) -> list[GraphPair]:
        return [
            recomputed(
                _lower_layer(layer, Setting(sizes, chosen, rotary, index, way, eight)),
                wanted[index],
                str(index),
            )
            for index, layer in model.own_layers(chunk)
        ]

    number, placement = topology.pp_rank, sizes.context.placement
    if topology.pp_size == 1:
        placement = scheme(1, 1).placement
    assert scheme(topology.pp_size, 1).placement == placement, "built for another placement"
    held = placement.held(number)
    chunks, logits = [lowered(chunk) for chunk in held], None
    if number == placement.first:
        chunks[0].insert(0, lower_embedding(model.embedding, sizes, chosen))
    if number == placement.last:
        head = _head(model, sizes, chosen, loss)
        chunks[-1].append(recomputed(head.lower(), wanted[-1], HEAD))
        logits = head.lower_logits()
    if topology.pp_size > 1:
        chunks = [connect(layers, one, sizes) for layers, one in zip(chunks, held, strict=True)]
        if logits is not None and len(chunks[-1]) == 1:
            logits = replace(logits, receives=chunks[-1][0].forward.receives)
    for layers in chunks:
        check_chain(layers)
    every = tuple(chain.from_iterable(chunks))
    _check_trained(model, every)
    stage = Stage(number, placement, tuple(map(len, chunks)), scheme)
    keys = [str(index) for chunk in held for index, _ in model.own_layers(chunk)]
    if number == placement.first:
        keys.insert(0, "")
    if number == placement.last:
        keys.append(HEAD)
    return Lowered(
        every,
        logits,
        chosen,
        stage,
        frozenset(slots),
        tuple(keys),
        lower_tied(model),
        host,
    )


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


def _head(model: Any, sizes: Sizes, kernels: Kernels, loss: Loss | None) -> HeadLowering:
    for supported in (norm.SUPPORTED, linear.SUPPORTED):
        check_config(model.transformer_config, supported)
    final = Norm.of(model.final_norm, "final", kernels, "the model")
    weight, bias = model.output_weight, model.output_layer.bias
    output = ColumnLinear("output", weight, bias, Held.VOCABULARY, kernels.linear)
    return HeadLowering(final, output, model.config.vocab_size, sizes, kernels, loss)


def _lower_layer(layer: Any, setting: Setting) -> GraphPair:
    make = LAYERS.get(type(layer))
    if make is not None:
        return make(layer, setting)
    if isinstance(layer, MegatronModule):
        known = " or ".join(f"a {one.__name__}" for one in LAYERS)
        raise ValueError(
            f"layer {setting.index} is a Megatron-core {type(layer).__name__}, which has no"
            f" lowering: use {known}, or a torch.nn.Module of your own, which runs as one operator"
        )
    return lower_module(layer, setting.sizes, setting.index)
