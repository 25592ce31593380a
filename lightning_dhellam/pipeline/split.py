"""How many layers each chunk of the fold has. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from lightning_dhellam.pipeline.schedules import Placement


def chunks(split: Sequence[int]) -> tuple[range, ...]:
    """Return the layers of each chunk, in the order of the model."""
    return tuple(range(*ends) for ends in pairwise(accumulate(split, initial=0)))


def balanced(
    layers: int, stages: int, *, embedding: float = 0.0, head: float = 0.0
) -> tuple[int, ...]:
    """Balance the layers of the 2P chunks, so that the slowest stage has as little to do as can be.

    Stage 0 holds the embedding and the head as well, and may need no other layer. Its two chunks
    are made as equal in cost as they can be, those of every other stage as equal in number; an
    odd layer goes to the chunk that comes later, whose activations are held for a shorter time.

    Args:
        layers: how many layers the model has.
        stages: P, at least 1.
        embedding: cost of the embedding, in layers.
        head: cost of the output layer and the loss, in layers.

    Raises:
        ValueError: too few layers.
    """
    if stages == 1:
        return _halves(layers, embedding, head)
    others = stages - 1
    most = layers - 2 * others
    if most < 0:
        raise ValueError(
            f"pipeline_parallel_size={stages} needs at least {2 * others} layers, two on every"
            f" stage but the first, and the model has num_layers={layers}: lower"
            " pipeline_parallel_size or add layers"
        )

    def slowest(first: int) -> tuple[float, float]:
        elsewhere = layers - first
        times = (first + embedding + head, -(-elsewhere // others))
        return max(times), -min(times)

    first = min(range(most + 1), key=slowest)
    each, more = divmod(layers - first, others)
    counts = [each + (stage >= stages - more) for stage in range(1, stages)]
    early, late = _halves(first, embedding, head)
    falling = [early, *(count // 2 for count in counts)]
    rising = [late, *(count - count // 2 for count in counts)]
    return (*falling, *reversed(rising))


def _halves(layers: int, embedding: float, head: float) -> tuple[int, int]:
    """Return the layers before and after the turn, with the embedding and the head at the ends."""
    early = min(
        range(layers + 1), key=lambda count: abs(embedding + count - (head + layers - count))
    )
    return early, layers - early


def check_split(split: Sequence[int], layers: int, stages: int) -> tuple[int, ...]:
    """Return the split that a user has given, if it can be.

    Raises:
        ValueError: with the value, the rule and the remedy.
    """
    shown = f"pipeline_split={list(split)}"
    if any(isinstance(count, bool) or not isinstance(count, int) for count in split):
        raise ValueError(f"{shown} must be whole numbers of layers, one for each chunk")
    if len(split) != 2 * stages:
        raise ValueError(
            f"{shown} has {len(split)} entries: with pipeline_parallel_size={stages} the layers"
            f" form {2 * stages} chunks; stage s holds chunks s and {2 * stages - 1}-s"
        )
    stage_of = Placement.folded(stages).stage_of
    for chunk, (stage, count) in enumerate(zip(stage_of, split, strict=True)):
        # The embedding and the head make chunks of their own on stage 0.
        if count < (stage > 0):
            raise ValueError(f"{shown}: chunk {chunk}, on stage {stage}, has no layers: give it 1")
    if sum(split) != layers:
        raise ValueError(
            f"{shown} places {sum(split)} layers, and the model has num_layers={layers}: every"
            " layer needs one chunk"
        )
    return tuple(split)
