"""Ranks that share experts meet in every micro-batch, so all of them need as many as each other.

Those that share a sequence or layers are fed alike. But experts see the tokens of several batches,
where they are spread over more ranks than those: then a rank with a micro-batch less would leave
the others waiting. So they say to each other, in host memory, how many they have.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_dhellam.engine.batch import MicroBatch, blank
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.hosts import Question


def check_as_many(pieces: Sequence[MicroBatch], context: ParallelContext) -> None:
    """Refuse micro-batches of a training step that others have more or fewer of.

    Raises:
        ValueError: on all ranks.
    """
    few, most = _numbers(pieces, context)
    if few != most:
        raise ValueError(
            f"with expert_parallel_size={context.topology.ep_size} ranks share experts, but were"
            f" given batches of {few} and of {most} micro-batches: all ranks must train on equally"
            " many samples at a time; leave out the last batch of a loader if it is smaller on some"
            " (drop_last=True)"
        )


def as_many(pieces: list[MicroBatch], context: ParallelContext) -> list[MicroBatch]:
    """Add micro-batches that count nothing, until there are as many as other ranks have.

    Without gradients a rank may have fewer samples than others, or none of its own.
    """
    _, most = _numbers(pieces, context)
    return [*pieces, *[blank(pieces[-1])] * (most - len(pieces))]


def _numbers(pieces: Sequence[MicroBatch], context: ParallelContext) -> tuple[int, int]:
    """The fewest and the most micro-batches of a rank."""
    own = len(pieces)
    if not context.topology.experts_see_several_batches or context.emulated:
        return own, own
    few, most = Question([-own, own], context.host_group).answer()
    return -int(few), int(most)
