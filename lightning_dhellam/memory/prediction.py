"""What every rank of a run takes, from what the run is told: no process and no GPU is needed.

A rank's share of the model is built by Megatron-core on tensors without memory, with its gradient
buffers and its optimizer, and the engine walks a step of it on lanes that only count. So the terms
are those of the run itself:

    weights, gradients, optimizer   what `model_states` counts: Megatron's padding and shards too
    activations                     the most that all slots of a step take at once: saved ones,
                                    those in use within a layer, what is gathered and received
    held                            what a GPU holds of slots beyond their last reader
    batch                           tokens, labels and what is made of them
    slack                           an assumption: see `RankMemory.slack`

Experts are taken to be used evenly. What CUDA and NCCL take for themselves is none of it: it is no
part of what a device has to give (`limit`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.optim import AdamW, Optimizer

from lightning_dhellam.engine import MicroBatch
from lightning_dhellam.layers import Loss, Lowered, lower
from lightning_dhellam.memory.activations import (
    Peak,
    activation_peak,
    micro_batches,
    without_memory,
)
from lightning_dhellam.memory.fitting import SHARE, fit_by_rule
from lightning_dhellam.memory.model_states import (
    ModelStates,
    bytes_of,
    model_states,
    tensors_in,
)
from lightning_dhellam.models import CausalLM, ModelConfig, pipeline_split
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.gradients import GradientBuffers
from lightning_dhellam.parallel.optimizer import ModelParallelOptimizer
from lightning_dhellam.parallel.planned import planned_context
from lightning_dhellam.parallel.topology import Topology
from lightning_dhellam.parallel.wrapping import holders, shards
from lightning_dhellam.pipeline.schedules import Placement, Scheme, begun, placement_of, scheme_of
from lightning_dhellam.plan import Builder
from lightning_dhellam.plan.by_layer import AUTO, USUAL, ByLayer
from lightning_dhellam.plan.file import PlanFile, named_plan
from lightning_dhellam.plan.offloading import ALL, Offload
from lightning_dhellam.plan.passes import Recompute
from lightning_dhellam.precision import PRECISIONS

WORKSPACE = 128 << 20
"""Bytes that GEMMs and attention ask for while they run: cuBLAS alone takes 32 MiB for each of the
streams that compute on a Hopper GPU, and as much for its scaled products."""
FRAGMENTS = 0.02
"""Of what comes and goes: what the allocator cannot give to a tensor of another size. It hands out
blocks of 2 MiB, and the slots of a step have few sizes, which repeat in every layer."""


def adamw(model: CausalLM) -> Optimizer:
    """Make AdamW of all that is trained."""
    return AdamW([p for p in model.parameters() if p.requires_grad])


@dataclass(frozen=True)
class Run:
    """What the memory of a run follows from.

    Attributes:
        config: of the model.
        topology: sizes of the run, of any of its ranks.
        samples: of a data-parallel rank's batch.
        length: tokens of a sequence.
        micro_batch_size: samples that go through the layers together.
        precision: `32-true`, `bf16-mixed` or `bf16-true`.
        plan: the name of a built-in plan, or the path of a plan file; `auto` is taken to find one
            that takes as much as `interleaved`.
        recompute: what backward makes again; `auto` chooses for `memory_limit`, and is taken to
            make all of a layer again where that is not known, or where nothing fits.
        split: layers of each chunk of the pipeline; None to balance them.
        distributed_optimizer: whether its state is sharded; None to do so where that helps.
        bucket_size: parameters of a bucket; None for Megatron's default.
        context_exchange: how keys come to the ranks that share sequences.
        context_fp32_gradients: whether gradients by them travel in fp32.
        context_fp8_keys: whether keys and values travel in 8 bits.
        schedule: order of the pipeline's works: a name, or the path of a file; None for the usual
            one.
        offload: what of that which is saved waits for backward in host memory; `auto` is chosen
            with what is made again.
        fp8: how linear layers compute in 8 bits, or None.
        fp8_all_gather: whether what they gather travels in 8 bits.
        loss: of the user's own, or None.
        build: makes a rank's part of the model; None for that of `config`.
        optimizer: makes the optimizer of a planned model.
        memory_limit: bytes that a rank may take, by which `auto` chooses; None if not known.
    """

    config: ModelConfig
    topology: Topology
    samples: int
    length: int
    micro_batch_size: int = 1
    precision: str = "bf16-mixed"
    plan: str = "interleaved"
    recompute: Recompute | ByLayer = "gathers"
    split: tuple[int, ...] | None = None
    distributed_optimizer: bool | None = None
    bucket_size: int | None = None
    context_exchange: str = "ring"
    context_fp32_gradients: bool = True
    context_fp8_keys: bool = False
    schedule: str | None = None
    offload: Offload = None
    fp8: str | None = None
    fp8_all_gather: bool = False
    loss: Loss | None = None
    build: Callable[[ParallelContext, torch.dtype], CausalLM] | None = None
    optimizer: Callable[[CausalLM], Optimizer] = adamw
    memory_limit: int | None = None

    def check(self) -> None:
        """Refuse sizes that the model cannot be cut into.

        Raises:
            ValueError: with the value, the rule and the remedy.
        """
        topology = self.topology
        self.config.validate(
            topology.tp_size, topology.ep_size, topology.etp_size, topology.cp_size
        )
        self.layers_of_chunks()

    def layers_of_chunks(self) -> tuple[int, ...]:
        """How many layers each chunk of the pipeline has."""
        given = None if self.split is None else list(self.split)
        return tuple(pipeline_split(self.config, self.placement, given))

    @property
    def placement(self) -> Placement:
        """Which stage holds which chunk of the layers."""
        return placement_of(self.schedule, self.topology.pp_size)

    @property
    def begun(self) -> str:
        """The schedule that it begins with."""
        sizes = self.topology.pp_size, self.topology.shared
        return begun(self.schedule, *sizes, self.recompute, self.offload)

    @property
    def scheme(self) -> Scheme:
        """What makes the schedules that it begins with."""
        return scheme_of(self.begun, self.topology.pp_size)


@dataclass(frozen=True)
class RankMemory:
    """Bytes that a rank takes when it takes most, by what for.

    Attributes:
        stage: its pipeline stage.
        ranks: how many ranks of the stage take as much: all of them.
        weights: parameters and buffers of modules.
        gradients: Megatron's buffers.
        optimizer: master weights and state.
        activations: all slots of a step.
        batch: tokens, labels, and what is made of them.
        held: beyond that of slots whose last reader was issued, until the lane that made them has
            waited for it: on GPUs, where lanes run behind the host.
        host: host memory in which offloaded slots wait, no part of what the device holds.
    """

    stage: int
    ranks: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    batch: int
    held: int = 0
    host: int = 0

    @property
    def tensors(self) -> int:
        """All that is in use at once."""
        states = self.weights + self.gradients + self.optimizer
        return states + self.activations + self.batch

    @property
    def allocated(self) -> int:
        """All that a GPU has given away at once, without slack."""
        return self.tensors + self.held

    @property
    def slack(self) -> int:
        """What is assumed beside it."""
        return WORKSPACE + round(FRAGMENTS * (self.activations + self.batch))

    @property
    def total(self) -> int:
        """All, slack included."""
        return self.allocated + self.slack

    @property
    def parts(self) -> Mapping[str, int]:
        """The bytes by what for, in the order of a table."""
        names = ("weights", "gradients", "optimizer", "activations", "batch", "held", "slack")
        return {name: getattr(self, name) for name in names}


def predict(run: Run) -> tuple[RankMemory, ...]:
    """Predict the memory of every rank: of each pipeline stage, whose ranks are alike.

    Raises:
        ValueError: a value that no run can have.
    """
    run.check()
    each = run.topology.stage_size
    return tuple(predict_rank(run, stage * each) for stage in range(run.topology.pp_size))


def predict_rank(run: Run, rank: int) -> RankMemory:
    """Predict the memory of one rank; see `predict`."""
    topology = replace(run.topology, rank=rank)
    numbers = PRECISIONS[run.precision]
    split = run.layers_of_chunks() if topology.pp_size > 1 else ()
    with without_memory():
        context = planned_context(topology, torch.device("cpu"), split, run.placement)
        build = run.build or (lambda context, dtype: CausalLM(run.config, context, dtype))
        model = build(context, numbers.dtype)
        if model.tied_copy is not None:
            # Whether it is trained is known where the embedding is.
            first = replace(topology, rank=run.placement.first * topology.stage_size)
            there = planned_context(first, context.device, split, run.placement)
            model.train_tied(build(there, numbers.dtype).wants_tied)
        found = _model_states(run, model, context)
        peak, batch = _step(run, model, topology, found.total)
    return RankMemory(
        topology.pp_rank,
        topology.stage_size,
        found.weights,
        found.gradients,
        found.optimizer,
        peak.slots,
        batch,
        peak.allocated - peak.slots,
        peak.host,
    )


def step_bytes(
    run: Run, rank: int, trained: Mapping[str, bool], states: int, *, tied: bool = True
) -> tuple[Peak, int]:
    """Predict the most bytes of slots in a step of one rank, and those of its batch.

    Args:
        run: of which the rank is one.
        rank: which.
        trained: which of its parameters require a gradient, by name.
        states: bytes of its weights, gradients and optimizer.
        tied: whether a weight is trained that stages share.
    """
    topology = replace(run.topology, rank=rank)
    split = run.layers_of_chunks() if topology.pp_size > 1 else ()
    with without_memory():
        context = planned_context(topology, torch.device("cpu"), split, run.placement)
        build = run.build or (lambda context, dtype: CausalLM(run.config, context, dtype))
        model = build(context, PRECISIONS[run.precision].dtype)
        model.train_tied(tied)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained.get(name, parameter.requires_grad))
            if parameter.requires_grad:
                parameter.main_grad = torch.empty_like(  # type: ignore[attr-defined]
                    parameter, dtype=torch.float32
                )
        return _step(run, model, topology, states)


def _model_states(run: Run, model: CausalLM, context: ParallelContext) -> ModelStates:
    numbers = PRECISIONS[run.precision]
    optimizer = run.optimizer(model)
    of_model = holders(model, context.topology)
    sharded = shards(optimizer, run.distributed_optimizer, run.precision, of_model)
    buffers = GradientBuffers(
        model,
        model.transformer_config,
        context,
        sharded=sharded,
        fp32=numbers.fp32_gradients,
        bucket_size=run.bucket_size,
    )
    wrapped = ModelParallelOptimizer(
        optimizer,
        buffers,
        context,
        {parameter: name for name, parameter in model.named_parameters()},
        sharded=sharded,
        master_weights=numbers.master_weights,
        max_skipped_steps=1,
    )
    return model_states(model, buffers, wrapped)


def _step(run: Run, model: CausalLM, topology: Topology, states: int) -> tuple[Peak, int]:
    """The most bytes of slots in a step, and those of the batch."""
    lowering = partial(
        lower,
        model,
        loss=run.loss,
        context_exchange="ring" if run.context_exchange == "auto" else run.context_exchange,
        context_fp32_gradients=run.context_fp32_gradients,
        context_fp8_keys=run.context_fp8_keys,
        scheme=run.scheme,
        fp8=run.fp8,
        fp8_all_gather=run.fp8_all_gather,
        # Nothing computes here: what is asked for is how large it is.
        kernels={"fp8": "reference"} if run.fp8 else None,
    )
    builder = named_plan("interleaved" if run.plan == "auto" else run.plan)
    pieces = micro_batches(topology, run.samples, run.micro_batch_size, run.length)
    # More change nothing: by then as many are held as ever will be.
    most = (2 * topology.pp_size + 2) * run.micro_batch_size
    again, away = _chosen(run, lowering, builder, pieces, states)
    peak = activation_peak(
        lowering(recompute=again, offload=away),
        builder,
        topology,
        samples=min(run.samples, most),
        micro_batch_size=run.micro_batch_size,
        length=run.length,
    )
    return peak, bytes_of(tensors_in(piece.slots for piece in pieces))


def _chosen(
    run: Run,
    lowering: Callable[..., Lowered],
    builder: Builder,
    pieces: Sequence[MicroBatch],
    states: int,
) -> tuple[Recompute | ByLayer, Offload]:
    """What is made again and what waits on the host: what was given, or what `auto` chooses."""
    if run.recompute != AUTO:
        return run.recompute, run.offload
    if run.plan.endswith(".json"):
        file = PlanFile.load(run.plan)
        return file.recompute or USUAL, file.offload if run.offload == AUTO else run.offload
    least = "full", ALL if run.offload == AUTO else run.offload
    if run.memory_limit is None:
        return least
    whole, kept = (
        _suited(lowering(recompute=again, offload=away), run.length)
        for again, away in (least, ("none", None))
    )
    try:
        found = fit_by_rule(
            whole.layers,
            kept,
            builder,
            micro_batches=len(pieces),
            tokens=max(piece.tokens for piece in pieces),
            room=run.memory_limit * SHARE - states,
        )
    except ValueError:  # nothing fits: the least is what can be said
        return least
    return found.choices, found.offloads if run.offload == AUTO else run.offload


def _suited(lowered: Lowered, length: int) -> Lowered:
    return replace(lowered, layers=tuple(pair.at(length) for pair in lowered.layers))
