"""The place of a rank in the fold: which of its layers go beside each other in which visit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import zip_longest
from typing import NamedTuple

from lightning_dhellam.pipeline.schedule import Schedule, Visit, Way, fold
from lightning_dhellam.pipeline.verify import verify
from lightning_dhellam.plan.operator import Strand

Pair = tuple[int | None, int | None]
"""Layers of this rank that go beside each other: one forward, one backward."""


class Leg(NamedTuple):
    """Visits that follow each other on one stage without a transfer between them: one walk.

    Attributes:
        pairs: layers that go beside each other, in walking order.
        forward: micro-batch that goes forward, or None.
        backward: micro-batch that goes backward, or None.
    """

    pairs: tuple[Pair, ...]
    forward: int | None
    backward: int | None

    @property
    def steps(self) -> tuple[Pair, ...]:
        """The pairs, without the layers of a strand that is absent."""
        both = (
            (f if self.forward is not None else None, b if self.backward is not None else None)
            for f, b in self.pairs
        )
        return tuple(pair for pair in both if pair != (None, None))

    @property
    def begins(self) -> tuple[tuple[Strand, int], ...]:
        """The strands that take part, and the first layer of each."""
        ahead = [(Strand.FORWARD, f) for f, _ in self.steps if f is not None]
        behind = [(Strand.BACKWARD, b) for _, b in self.steps if b is not None]
        return (*ahead[:1], *behind[:1])


@dataclass(frozen=True)
class Stage:
    """A stage and its layers: those of chunk `number`, then those of the fold of it.

    Attributes:
        number: number of this rank's stage, from 0.
        count: how many stages there are.
        layers: how many layers both chunks have, embedding and head included.
        turn: how many of them are in the first chunk.
    """

    number: int
    count: int
    layers: int
    turn: int

    @classmethod
    def alone(cls, layers: int) -> Stage:
        """Make the only stage, which turns nowhere."""
        return cls(0, 1, layers, layers)

    @property
    def is_last(self) -> bool:
        """Whether the strands turn here."""
        return self.number == self.count - 1

    def legs(self, micro_batches: int, *, backward: bool = True) -> list[Leg]:
        """Return the visits of a step as walks over this stage's layers.

        On the last stage nothing comes between a descending visit and the ascending one of the
        same micro-batches, so the two are one walk.
        """
        schedule = verified(self.count, micro_batches, backward)
        return [
            Leg(self.pairs(visit.way), visit.forward, visit.backward)
            for visit in schedule[self.number]
            if not self._continues(visit)
        ]

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
        return [Leg(pairs, *turn) for turn in turns for pairs in self.pairings()]

    def _continues(self, visit: Visit) -> bool:
        return self.is_last and visit.way is Way.ASCENDING

    def pairs(self, way: Way) -> tuple[Pair, ...]:
        """Return the layers of a visit, two by two; those left over have no partner.

        A descending visit pairs from its first layers on and an ascending one up to its last, so
        that the embedding and the head, where they are, meet in both.
        """
        if self.is_last:
            return tuple((index, self.layers - 1 - index) for index in range(self.layers))
        early, late = range(self.turn), range(self.turn, self.layers)
        if way is Way.DESCENDING:
            return tuple(zip_longest(early, reversed(late)))
        from_the_end = list(zip_longest(reversed(late), early))
        return tuple(reversed(from_the_end))

    def pairings(self) -> Iterator[tuple[Pair, ...]]:
        """Give the pairs of layers of every kind of leg."""
        yield self.pairs(Way.DESCENDING)
        if not self.is_last:
            yield self.pairs(Way.ASCENDING)


@lru_cache(maxsize=64)
def verified(stages: int, micro_batches: int, backward: bool = True) -> Schedule:
    """Return the fold, after the proof that it can run."""
    schedule = fold(stages, micro_batches, backward=backward)
    verify(schedule, micro_batches, backward=backward)
    return schedule
