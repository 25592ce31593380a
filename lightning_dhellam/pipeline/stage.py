"""The place of a rank in the pipeline: which of its layers go beside each other in which walk."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise, zip_longest
from typing import NamedTuple

from lightning_dhellam.pipeline.schedules import (
    Part,
    Placement,
    Schedule,
    Scheme,
    Visit,
    Walk,
    counts_of,
    fold,
    sends_ahead,
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
        part: which part of backward that is.
    """

    pairs: tuple[Pair, ...]
    forward: int | None
    backward: int | None
    part: Part = Part.BACKWARD

    @property
    def begins(self) -> tuple[tuple[Strand, int], ...]:
        """The strands that take part, and the first layer of each."""
        ahead = [(Strand.FORWARD, f) for f, _ in self.pairs if f is not None]
        behind = [(Strand.BACKWARD, b) for _, b in self.pairs if b is not None]
        return (*ahead[:1], *behind[:1])


class Step(NamedTuple):
    """What a stage does in a step.

    Attributes:
        legs: its walks.
        ahead: walks after which it may wait for what it has sent.
    """

    legs: tuple[Leg, ...]
    ahead: int

    @property
    def last(self) -> dict[int, int]:
        """The index of the last walk of each micro-batch."""
        both = ((i, k) for i, leg in enumerate(self.legs) for k in (leg.forward, leg.backward))
        return {k: index for index, k in both if k is not None}

    def kinds(self) -> tuple[Leg, ...]:
        """Its walks as if there were but one of a kind, whichever micro-batches they are of."""
        bare = (
            leg._replace(
                forward=None if leg.forward is None else 0,
                backward=None if leg.backward is None else 0,
            )
            for leg in self.legs
        )
        return tuple(dict.fromkeys(bare))


@dataclass(frozen=True)
class Stage:
    """A stage and its layers, which are numbered from 0 through all its chunks in order.

    Attributes:
        number: number of this rank's stage, from 0.
        placement: which stage holds each chunk.
        counts: how many layers each chunk of this stage has, embedding and head included.
        scheme: makes the schedule of a step.
    """

    number: int
    placement: Placement
    counts: tuple[int, ...]
    scheme: Scheme = fold

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

    def step(self, micro_batches: int, *, backward: bool = True) -> Step:
        """Return the walks of a step over this stage's layers.

        Raises:
            ScheduleError: the schedule is not defined for so many micro-batches.
        """
        return _step(self, micro_batches, backward)

    def fewest(self, micro_batches: int) -> int:
        """Return the fewest micro-batches that walk in every way in which so many would.

        It is at least two, if there are two.
        """
        return _fewest(self, micro_batches)

    def kinds(self) -> tuple[Leg, ...]:
        """Return every kind of walk that steps have, however many micro-batches they have."""
        found: dict[Leg, None] = {}
        for count in counts_of(self.scheme, self.count):
            found.update((kind, None) for kind in self.step(count).kinds())
        return tuple(found)

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

    def leg(self, walk: Walk) -> Leg:
        """Return a walk as layers of this stage."""
        strands = {work.strand: work for work in walk[0]}
        ahead, behind = strands.get(Strand.FORWARD), strands.get(Strand.BACKWARD)
        return Leg(
            self.pairs(walk),
            None if ahead is None else ahead.micro_batch,
            None if behind is None else behind.micro_batch,
            behind.part if behind else Part.BACKWARD,
        )


def _ascends(works: Visit) -> bool:
    """Whether two strands go up a fold: forward is in the later chunk."""
    chunks = {work.strand: work.chunk for work in works}
    return len(chunks) == 2 and chunks[Strand.FORWARD] > chunks[Strand.BACKWARD]


@lru_cache(maxsize=256)
def _step(stage: Stage, micro_batches: int, backward: bool) -> Step:
    schedule, ahead = verified(stage.scheme, stage.count, micro_batches, backward)
    legs = (stage.leg(walk) for walk in walks(schedule.visits[stage.number]))
    return Step(tuple(leg for leg in legs if leg.pairs), ahead)


@lru_cache(maxsize=256)
def _fewest(stage: Stage, micro_batches: int) -> int:
    kinds = set(stage.step(micro_batches).kinds())
    counts = range(min(2, micro_batches), micro_batches + 1)
    return next(n for n in counts if kinds <= set(stage.step(n).kinds()))


@lru_cache(maxsize=256)
def verified(
    scheme: Scheme, stages: int, micro_batches: int, backward: bool = True
) -> tuple[Schedule, int]:
    """Return a schedule after the proof that it can run, and how far senders are ahead in it."""
    schedule = scheme(stages, micro_batches)
    if not backward:
        schedule = schedule.forward_only()
    verify(schedule)
    return schedule, sends_ahead(schedule)
