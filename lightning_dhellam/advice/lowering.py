"""From a run to the work of its step: a rank's share of each layer, lowered without memory.

The layers are lowered as if there were no pipeline, and then cut into its chunks. Where they are
all alike only a few are, and stand for the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_dhellam.layers import Lowered, lower
from lightning_dhellam.memory import Run
from lightning_dhellam.memory.activations import without_memory
from lightning_dhellam.models import CausalLM, ModelConfig
from lightning_dhellam.parallel.experts import is_expert
from lightning_dhellam.parallel.planned import planned_context
from lightning_dhellam.pipeline.split import chunks
from lightning_dhellam.plan import GraphPair
from lightning_dhellam.plan.by_layer import AUTO, HEAD, ByLayer, check_choices, choices_of
from lightning_dhellam.plan.offloading import check_offload
from lightning_dhellam.plan.passes import Recompute
from lightning_dhellam.precision import PRECISIONS
from lightning_dhellam.search.cluster import Weights, Work

_BUCKET = 40_000_000, 1_000_000
"""Parameters of a bucket by Megatron-core's default: at least, and for each replica."""


@dataclass(frozen=True)
class Lowering:
    """A rank's share of a model.

    Attributes:
        layers: embedding, layers, head, with the nominal costs of the sequences' length.
        weights: what each of them trains.
    """

    layers: tuple[GraphPair, ...]
    weights: tuple[Weights, ...]


def are_alike(config: ModelConfig) -> bool:
    """Whether all layers of a model have the same operators of the same sizes."""
    return len(set(config.expert_layers)) == len(set(config.windows)) == 1


def shortened(config: ModelConfig, layers: int) -> ModelConfig:
    """The same model with so many of its layers."""
    by_layer = {name: getattr(config, name) for name in ("window_layers", "moe_layer_freq")}
    cut: dict[str, Any] = {n: v[:layers] for n, v in by_layer.items() if isinstance(v, tuple)}
    return replace(config, num_layers=layers, **cut)


def on_device(run: Run) -> Run:
    """The same run with all on the device where it chooses what waits on the host.

    What it will choose nobody knows before it has measured.
    """
    return replace(run, offload=None) if run.offload == AUTO else run


def lowering_of(run: Run) -> Lowering:
    """Lower a rank's share of each layer.

    Raises:
        ValueError: the model cannot be cut like this, or a layer not be lowered.
    """
    run = on_device(run)
    run.check()
    config, count = run.config, run.config.num_layers
    few = run.build is None and are_alike(config) and not isinstance(run.recompute, Mapping)
    if few:
        config = shortened(config, 1)
    made_again = _by_layer(run)
    with without_memory():
        context = planned_context(replace(run.topology, rank=0).stage, torch.device("cpu"))
        dtype = PRECISIONS[run.precision].dtype
        model = run.build(context, dtype) if run.build else CausalLM(config, context, dtype)
        lowered = lower(
            model,
            recompute=made_again,
            loss=run.loss,
            context_exchange="ring" if run.context_exchange == "auto" else run.context_exchange,
            context_fp32_gradients=run.context_fp32_gradients,
            context_fp8_keys=run.context_fp8_keys,
            fp8=run.fp8,
            fp8_all_gather=run.fp8_all_gather,
            offload=run.offload,
            # Nothing computes here: what is asked for is what there is to do.
            kernels={"fp8": "reference"} if run.fp8 else None,
        )
        check_choices(made_again, lowered.slots)
        check_offload(run.offload, lowered.slots | lowered.inputs)
        layers, weights = _sized(lowered, run.length)
    if few:
        layers = (layers[0], *layers[1:2] * count, layers[2])
        weights = (weights[0], *weights[1:2] * count, weights[2])
    return Lowering(layers, weights)


def work_of(run: Run, lowering: Lowering | None = None) -> Work:
    """The work of a run's step.

    Args:
        run: of which every rank has the same.
        lowering: of a rank, where it is known.

    Raises:
        ValueError: as `lowering_of`; or the batch is no whole number of micro-batches.
    """
    found = lowering or lowering_of(run)
    topology = run.topology
    if run.samples % run.micro_batch_size:
        raise ValueError(
            f"a rank's batch of {run.samples} samples is no multiple of"
            f" micro_batch_size={run.micro_batch_size}: make one of them fit the other"
        )
    numbers = PRECISIONS[run.precision]
    replicas = max(topology.replicas, topology.expert_dp_size)
    least, each = _BUCKET
    split = run.layers_of_chunks() if topology.pp_size > 1 else (run.config.num_layers, 0)
    return Work(
        found.layers,
        found.weights,
        split,
        topology.pp_size,
        run.samples // run.micro_batch_size,
        run.micro_batch_size * run.length // topology.cp_size,
        sharded=run.distributed_optimizer is not False
        and run.precision != "bf16-true"
        and replicas > 1,
        bucket=float(run.bucket_size or max(least, each * topology.replicas)),
        gradient_bytes=4.0 if numbers.fp32_gradients else float(numbers.dtype.itemsize),
        scheme=run.scheme,
    )


def _by_layer(run: Run) -> Recompute | ByLayer:
    """What is made again, by numbers of layers alone: there are no chunks without a pipeline.

    As `memory.predict` does, `auto` is taken to make all of a layer again.
    """
    if run.recompute == AUTO:
        return "full"
    if not isinstance(run.recompute, Mapping):
        return run.recompute
    split = run.layers_of_chunks()
    of_layers = [chunk for chunk, own in enumerate(chunks(split)) for _ in own]
    *each, head = choices_of(run.recompute, of_layers, len(split))
    return {**{str(n): one for n, one in enumerate(each)}, HEAD: head}


def _sized(lowered: Lowered, length: int) -> tuple[tuple[GraphPair, ...], tuple[Weights, ...]]:
    seen: set[int] = set()
    weights = []
    for pair in lowered.layers:
        counts = {True: 0.0, False: 0.0}
        for operator in pair.backward.operators:
            for parameter in operator.accumulates:
                if id(parameter) not in seen and parameter.requires_grad:
                    seen.add(id(parameter))
                    counts[is_expert(parameter)] += parameter.numel()
        weights.append(Weights(counts[False], counts[True]))
    return tuple(pair.at(length) for pair in lowered.layers), tuple(weights)
