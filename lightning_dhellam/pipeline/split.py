"""How many layers each chunk of a pipeline has. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from lightning_dhellam.pipeline.schedules import Placement


def chunks(split: Sequence[int]) -> tuple[range, ...]:
    """Return the layers of each chunk, in the order of the model."""
    return tuple(range(*ends) for ends in pairwise(accumulate(split, initial=0)))


def balanced(
    layers: int, placement: Placement, *, embedding: float = 0.0, head: float = 0.0
) -> tuple[int, ...]:
    """Balance the layers of the chunks, so that the slowest stage has as little to do as can be.

    The first chunk has the embedding as well and the last one the head, and these may need no other
    layer. Chunks of one stage are made as equal as they can be; of equals the later one gets an odd
    layer, since its activations are held for a shorter time.

    Args:
        layers: how many layers the model has.
        placement: which stage holds each chunk.
        embedding: cost of the embedding, in layers.
        head: cost of the output layer and the loss, in layers.

    Raises:
        ValueError: too few layers.
    """
    last = placement.chunks - 1
    counts = [int(chunk not in (0, last)) for chunk in range(placement.chunks)]
    costs = list(map(float, counts))
    costs[0] += embedding
    costs[last] += head
    fewest = sum(counts)
    if layers < fewest:
        raise ValueError(
            f"pipeline_parallel_size={placement.stages} needs at least {fewest} layers, one in each"
            f" of {placement.chunks} chunks but the first and the last, and the model has"
            f" num_layers={layers}: lower pipeline_parallel_size or add layers"
        )
    held = [placement.held(stage)[::-1] for stage in reversed(range(placement.stages))]
    for _ in range(layers - fewest):
        stage = min(held, key=lambda chunks: sum(costs[chunk] for chunk in chunks))
        chunk = min(stage, key=lambda chunk: costs[chunk])
        counts[chunk] += 1
        costs[chunk] += 1
    return tuple(counts)


def check_split(split: Sequence[int], layers: int, placement: Placement) -> tuple[int, ...]:
    """Return the split that a user has given, if it can be.

    Raises:
        ValueError: with the value, the rule and the remedy.
    """
    shown = f"pipeline_split={list(split)}"
    if any(isinstance(count, bool) or not isinstance(count, int) for count in split):
        raise ValueError(f"{shown} must be whole numbers of layers, one for each chunk")
    if len(split) != placement.chunks:
        raise ValueError(
            f"{shown} has {len(split)} entries: with pipeline_parallel_size={placement.stages} the"
            f" layers form {placement.chunks} chunks, on stages {placement}"
        )
    for chunk, (stage, count) in enumerate(zip(placement.stage_of, split, strict=True)):
        # The embedding and the head make chunks of their own.
        if count < (chunk not in (0, placement.chunks - 1)):
            raise ValueError(f"{shown}: chunk {chunk}, on stage {stage}, has no layers: give it 1")
    if sum(split) != layers:
        raise ValueError(
            f"{shown} places {sum(split)} layers, and the model has num_layers={layers}: every"
            " layer needs one chunk"
        )
    return tuple(split)
