"""Which stage holds which chunk of the layers, and what goes from stage to stage."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, Self

from lightning_dhellam.plan.operator import Strand


class Edge(NamedTuple):
    """Carries one strand's tensors from a stage to another: first in, first out."""

    source: int
    target: int
    strand: Strand

    def __str__(self) -> str:
        return f"{self.strand} {self.source}→{self.target}"


@dataclass(frozen=True)
class Placement:
    """The stage of each chunk. Forward goes through the chunks in order.

    Attributes:
        stage_of: stage of each chunk, from 0.
    """

    stage_of: tuple[int, ...]

    @classmethod
    def folded(cls, stages: int) -> Self:
        """Fold the layers: of P stages, stage s holds chunks s and 2P-1-s, and so both ends meet.

        A micro-batch goes forward down the stages, turns on the last one and comes up again.
        """
        return cls((*range(stages), *reversed(range(stages))))

    @classmethod
    def straight(cls, stages: int, rounds: int = 1) -> Self:
        """Let the chunks go round: of P stages, stage s holds chunks s, s + P, s + 2P and so on."""
        return cls(tuple(range(stages)) * rounds)

    @property
    def stages(self) -> int:
        """How many stages there are."""
        return max(self.stage_of) + 1

    @property
    def chunks(self) -> int:
        """How many chunks the layers are cut into."""
        return len(self.stage_of)

    @property
    def is_folded(self) -> bool:
        """Whether the layers are folded."""
        return self == Placement.folded(self.stages)

    @property
    def first(self) -> int:
        """The stage of the embedding, where forward begins."""
        return self.stage_of[0]

    @property
    def last(self) -> int:
        """The stage of the head, where the loss is."""
        return self.stage_of[-1]

    @property
    def loop(self) -> tuple[Edge, ...]:
        """Where both ends are on different stages, the edge from the first to the last, and back.

        By them the head has the weight of an embedding that it is tied to.
        """
        if self.first == self.last:
            return ()
        ahead = Edge(self.first, self.last, Strand.FORWARD)
        return (ahead, Edge(self.last, self.first, Strand.BACKWARD))

    def edges(self, *, tied: bool) -> tuple[Edge, ...]:
        """Return the edges between stages, in one order for all of them.

        Args:
            tied: whether the head has the weight of the embedding, and so the edges of `loop`.
        """
        ahead = {ends for ends in pairwise(self.stage_of) if ends[0] != ends[1]}
        forward = {Edge(source, target, Strand.FORWARD) for source, target in ahead}
        backward = {Edge(target, source, Strand.BACKWARD) for source, target in ahead}
        return tuple(sorted({*forward, *backward, *(self.loop if tied else ())}))

    def held(self, stage: int) -> tuple[int, ...]:
        """Return the chunks that a stage holds, in the order of the model."""
        return tuple(chunk for chunk, place in enumerate(self.stage_of) if place == stage)

    def __str__(self) -> str:
        return " ".join(map(str, self.stage_of))
