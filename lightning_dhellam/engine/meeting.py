"""Ranks that share experts meet in every micro-batch, so all of them need as many as each other.

Those that share a sequence or layers are fed alike. But experts see the tokens of several batches,
where they are spread over more ranks than those: then a rank with a micro-batch less would leave
the others waiting. So they say to each other, in host memory, how many they have. Replicas that
balance experts together, by one loss over all of them, meet likewise.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_dhellam.engine.batch import MicroBatch, blank
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.hosts import Question


def check_as_many(
    pieces: Sequence[MicroBatch], context: ParallelContext, *, balanced: bool = False
) -> None:
    """Refuse micro-batches of a training step that others have more or fewer of.

    Args:
        pieces: the micro-batches.
        context: of this rank.
        balanced: whether replicas balance experts together.

    Raises:
        ValueError: on all ranks.
    """
    topology = context.topology
    together = balanced and topology.dp_size > 1
    few, most = _numbers(pieces, context, topology.experts_see_several_batches or together)
    if few != most:
        why = f"with expert_parallel_size={topology.ep_size} ranks share experts"
        if not topology.experts_see_several_batches:
            why = "with global_aux_loss data-parallel ranks balance experts together"
        raise ValueError(
            f"{why}, but were given batches of {few} and of {most} micro-batches: all ranks must"
            " train on equally many samples at a time; leave out the last batch of a loader if it"
            " is smaller on some (drop_last=True)"
        )


def as_many(pieces: list[MicroBatch], context: ParallelContext) -> list[MicroBatch]:
    """Add micro-batches that count nothing, until there are as many as other ranks have.

    Without gradients a rank may have fewer samples than others, or none of its own.
    """
    _, most = _numbers(pieces, context, context.topology.experts_see_several_batches)
    return [*pieces, *[blank(pieces[-1])] * (most - len(pieces))]


def _numbers(pieces: Sequence[MicroBatch], context: ParallelContext, meet: bool) -> tuple[int, int]:
    """The fewest and the most micro-batches of a rank; of this one, if ranks do not `meet`."""
    own = len(pieces)
    if not meet or context.emulated:
        return own, own
    few, most = Question([-own, own], context.host_group).answer()
    return -int(few), int(most)
