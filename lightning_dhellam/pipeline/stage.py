"""The place of a rank in the pipeline: which of its layers go beside each other in which walk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise, zip_longest
from typing import NamedTuple

from lightning_dhellam.pipeline.schedules import (
    Placement,
    Schedule,
    Visit,
    Walk,
    fold,
    verify,
    walks,
)
from lightning_dhellam.plan.operator import Strand

Pair = tuple[int | None, int | None]
"""Layers of this rank that go beside each other: one forward, one backward."""


class Leg(NamedTuple):
    """A walk over layers of a stage: visits without a transfer between them.

    Attributes:
        pairs: layers that go beside each other, in walking order.
        forward: micro-batch that goes forward, or None.
        backward: micro-batch that goes backward, or None.
    """

    pairs: tuple[Pair, ...]
    forward: int | None
    backward: int | None

    @property
    def begins(self) -> tuple[tuple[Strand, int], ...]:
        """The strands that take part, and the first layer of each."""
        ahead = [(Strand.FORWARD, f) for f, _ in self.pairs if f is not None]
        behind = [(Strand.BACKWARD, b) for _, b in self.pairs if b is not None]
        return (*ahead[:1], *behind[:1])


@dataclass(frozen=True)
class Stage:
    """A stage and its layers, which are numbered from 0 through all its chunks in order.

    Attributes:
        number: number of this rank's stage, from 0.
        placement: which stage holds each chunk.
        counts: how many layers each chunk of this stage has, embedding and head included.
    """

    number: int
    placement: Placement
    counts: tuple[int, ...]

    @classmethod
    def alone(cls, layers: int) -> Stage:
        """Make the only stage, which turns nowhere."""
        return cls(0, Placement.folded(1), (layers, 0))

    @property
    def count(self) -> int:
        """How many stages there are."""
        return self.placement.stages

    @property
    def layers(self) -> int:
        """How many layers all chunks of this stage have."""
        return sum(self.counts)

    @property
    def chunks(self) -> dict[int, range]:
        """The chunks of this stage, and the layers of each."""
        ends = pairwise(accumulate(self.counts, initial=0))
        held = self.placement.held(self.number)
        return {chunk: range(*end) for chunk, end in zip(held, ends, strict=True)}

    def legs(self, micro_batches: int, *, backward: bool = True) -> list[Leg]:
        """Return the walks of a step over this stage's layers."""
        schedule = verified(self.count, micro_batches, backward)
        return [self._leg(walk) for walk in walks(schedule.visits[self.number])]

    def rehearsal(self, micro_batches: int, *, backward: bool = True) -> list[Leg]:
        """Return the walks of one or two micro-batches of which every chunk is on this stage.

        Two go beside each other in every kind of visit, so all of a step's plans are carried out.
        """
        assert 1 <= micro_batches <= 2
        turns: list[Pair]
        if not backward:
            turns = [(index, None) for index in range(micro_batches)]
        else:
            turns = [(0, None), (None, 0)] if micro_batches == 1 else [(0, None), (1, 0), (None, 1)]
        return [
            Leg(tuple(_taken(pairs, *turn)), *turn) for turn in turns for pairs in self.pairings()
        ]

    def pairings(self) -> Iterator[tuple[Pair, ...]]:
        """Give the pairs of layers of every kind of leg in which two strands meet."""
        schedule = verified(self.count, 2 * self.count)
        found = [
            self.pairs(walk)
            for walk in walks(schedule.visits[self.number])
            if all(len(works) == 2 for works in walk)
        ]
        return iter(dict.fromkeys(found))

    def pairs(self, walk: Walk) -> tuple[Pair, ...]:
        """Return the layers of a walk, two by two; those left over have no partner.

        A descending walk, whose forward is in the earlier chunk, pairs from its first layers on and
        an ascending one up to its last, so that the embedding and the head, where they are, meet in
        both.
        """
        ahead, behind = list[int](), list[int]()
        for work in (work for works in walk for work in works):
            layers = self.chunks[work.chunk]
            if work.strand is Strand.FORWARD:
                ahead += layers
            else:
                behind += reversed(layers)
        if not _ascends(walk[0]):
            return tuple(zip_longest(ahead, behind))
        return tuple(reversed(list(zip_longest(reversed(ahead), reversed(behind)))))

    def _leg(self, walk: Walk) -> Leg:
        micro_batch = {work.strand: work.micro_batch for work in walk[0]}
        both = micro_batch.get(Strand.FORWARD), micro_batch.get(Strand.BACKWARD)
        return Leg(self.pairs(walk), *both)


def _ascends(works: Visit) -> bool:
    """Whether two strands go up a fold: forward is in the later chunk."""
    chunks = {work.strand: work.chunk for work in works}
    return len(chunks) == 2 and chunks[Strand.FORWARD] > chunks[Strand.BACKWARD]


def _taken(pairs: tuple[Pair, ...], forward: int | None, backward: int | None) -> Iterator[Pair]:
    """Give the pairs without the layers of a strand that is absent."""
    for ahead, behind in pairs:
        pair = (ahead if forward is not None else None, behind if backward is not None else None)
        if pair != (None, None):
            yield pair


@lru_cache(maxsize=64)
def verified(stages: int, micro_batches: int, backward: bool = True) -> Schedule:
    """Return the fold, after the proof that it can run."""
    schedule = fold(stages, micro_batches)
    if not backward:
        schedule = schedule.forward_only()
    verify(schedule)
    return schedule
