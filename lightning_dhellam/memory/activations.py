"""What a step's activations take on one rank, as the engine holds them under its plans.

Everything follows from the lowered graphs: which slots are saved, how large they are, which chunks
of which micro-batches are held when, and what is live beside them inside of a pair of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_dhellam.engine import Engine, MicroBatch, cut
from lightning_dhellam.layers import Lowered
from lightning_dhellam.memory.sized import SizedLanes
from lightning_dhellam.parallel.topology import Topology
from lightning_dhellam.pipeline.schedules import Part
from lightning_dhellam.pipeline.stage import Stage
from lightning_dhellam.plan import Builder, GraphPair, passes


@dataclass(frozen=True)
class SavedBytes:
    """Bytes of the slots that backward reads of forward.

    Attributes:
        layers: of one micro-batch in each layer of the rank, embedding and head included.
        chunks: of one micro-batch in each of the rank's chunks, in their order; without a pipeline
            all are in the first.
        rank: the most that is held at once in a step, of all micro-batches.
    """

    layers: tuple[int, ...]
    chunks: tuple[int, ...]
    rank: int


def saved_bytes(
    layers: Sequence[GraphPair], stage: Stage, *, tokens: int, micro_batches: int
) -> SavedBytes:
    """Predict the bytes of saved slots per layer, per chunk and per rank.

    The place to ask what a choice of recomputation saves: it needs graphs alone, is exact between
    walks, and takes microseconds. Within a walk forward is taken to fill what it saves in a layer
    before the backward beside it frees anything; what is live beside saved slots is in
    `activation_peak`.

    Args:
        layers: of the rank, as they were lowered, with what backward makes again.
        stage: the rank's place in the pipeline.
        tokens: of a micro-batch on this rank: all that the rank's part of its sequences has.
        micro_batches: of a step.
    """
    each = tuple(pair.saved_bytes(tokens) for pair in layers)
    left = tuple(round(passes.left_bytes(pair) * tokens) for pair in layers)
    live = most = 0
    for leg in stage.step(micro_batches).legs:
        for forward, backward in leg.pairs:
            # Forward fills before backward frees, in the same pair of layers.
            live += each[forward] if forward is not None else 0
            most = max(most, live)
            if backward is not None:
                live -= _freed(leg.part, each[backward], left[backward])
    chunks = tuple(sum(each[index] for index in held) for held in stage.chunks.values())
    return SavedBytes(each, chunks, most)


def _freed(part: Part, saved: int, left: int) -> int:
    """What backward in a layer frees: all that is saved, or its halves what they do not leave."""
    return {Part.INPUT: saved - left, Part.WEIGHT: left}.get(part, saved)


class Peak(NamedTuple):
    """The most bytes that all slots of a step take at once.

    Attributes:
        slots: as they are counted: each until its last reader was issued.
        allocated: on a GPU, where memory goes back to the lane that made it only when that has
            waited for all who read it, and that of sends some walks later.
        host: host memory, in which offloaded slots wait.
    """

    slots: int
    allocated: int
    host: int = 0


def activation_peak(
    lowered: Lowered,
    builder: Builder,
    topology: Topology,
    *,
    samples: int,
    micro_batch_size: int,
    length: int,
) -> Peak:
    """Predict the most bytes that all slots of a training step take at once on one rank.

    The engine itself walks the step, on lanes that only count: saved slots, what is live inside of
    pairs of layers under their plans, gathered and exchanged tensors, and what is received ahead.
    Experts are taken to be used evenly.

    Args:
        lowered: of the rank, whose model has tensors without memory (see `planned`).
        builder: makes the plan of each pair of layers.
        topology: which rank.
        samples: of the rank's batch in a step.
        micro_batch_size: samples of a micro-batch; the last may have fewer.
        length: tokens of a sequence, before ranks share it.
    """
    lanes = SizedLanes()
    logits, stage, ends = lowered.logits, lowered.stage, lowered.ends
    engine = Engine(lowered.layers, lanes, builder, logits, stage, ends=ends)
    engine.suit(length)
    engine.train(micro_batches(topology, samples, micro_batch_size, length))
    assert not lanes.ledger.slots, "slots outlive the step"
    assert not lanes.allocated.bytes, "memory is held beyond the step"
    return Peak(lanes.ledger.peak_bytes, lanes.allocated.peak_bytes, lanes.host_bytes)


def micro_batches(
    topology: Topology, samples: int, micro_batch_size: int, length: int
) -> list[MicroBatch]:
    """The micro-batches of a step of one rank, of tokens that say nothing."""
    tokens, labels = (torch.empty(samples, length, dtype=torch.long) for _ in range(2))
    return cut(
        {"tokens": tokens, "labels": labels},
        micro_batch_size,
        device=tokens.device,
        seed=0,
        step=0,
        topology=topology,
    )


def without_memory() -> FakeTensorMode:
    """Enter where a model is planned: its tensors have a shape, and take no memory."""
    return FakeTensorMode(allow_non_fake_inputs=True)
