"""The visits of one step to every stage of the folded pipeline, as data.

With P stages the layers form 2P chunks, and stage s holds chunks s and 2P-1-s. A micro-batch goes
forward down the stages, turns on the last one and comes up again, and so does its gradient: a W.
So what goes forward and what comes backward visit the stages in the same order, and a stage takes
the forward of one micro-batch together with the backward of another that is P behind it. Two
stages, four micro-batches; digits go forward, letters backward (a is the backward of 0):

    stage 0   0↓      1↓  0↑  2↓a 1↑  3↓b 2↑a  c↓ 3↑b  d↓  c↑      d↑
    stage 1       0↓  0↑  1↓  1↑  2↓a 2↑a 3↓b 3↑b  c↓  c↑  d↓  d↑

The idea is DHeLlam's model folding (DHelix, arXiv 2411.15871). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from lightning_dhellam.plan.operator import Strand


class Way(StrEnum):
    """Which way both strands of a visit go through the stages: down to the last, or up again."""

    DESCENDING = "descending"
    ASCENDING = "ascending"


@dataclass(frozen=True, slots=True)
class Visit:
    """Works that a stage carries out together: forward of one chunk, and backward of its fold.

    Descending, chunk s goes forward and chunk 2P-1-s backward; ascending, the other way round.

    Attributes:
        way: which way both strands go.
        forward: the micro-batch that goes forward, or None.
        backward: the micro-batch that goes backward, or None.
    """

    way: Way
    forward: int | None
    backward: int | None

    def __str__(self) -> str:
        arrow = "↓" if self.way is Way.DESCENDING else "↑"
        named = (("F", self.forward), ("B", self.backward))
        return arrow + " ".join(f"{letter}{k}" for letter, k in named if k is not None)

    def micro_batch(self, strand: Strand) -> int | None:
        """Return the micro-batch of a strand, or None."""
        return self.forward if strand is Strand.FORWARD else self.backward

    def chunk(self, strand: Strand, stage: int, stages: int) -> int:
        """Return the chunk that a strand goes through on this stage."""
        early = (self.way is Way.DESCENDING) == (strand is Strand.FORWARD)
        return stage if early else 2 * stages - 1 - stage


Schedule = tuple[tuple[Visit, ...], ...]
"""The visits of each stage, in order."""


class Edge(NamedTuple):
    """Carries one strand's tensors from a stage to its neighbour: first in, first out."""

    source: int
    target: int
    strand: Strand

    def __str__(self) -> str:
        return f"{self.strand} {self.source}→{self.target}"


def fold(stages: int, micro_batches: int, *, backward: bool = True) -> Schedule:
    """Make the visits of every stage.

    Visit D(k) descends with the forward of micro-batch k and the backward of k-P, visit A(k)
    ascends with the same two; k runs from 0 to M+P-1. A partner that does not exist is left out,
    and so is a visit of neither. On stage s the order is 1F1B over D and A: P-1-s visits D ahead,
    then one D and one A in turn, then the visits A that are left. Backward reaches stage 0
    P visits D behind forward because forward of a micro-batch takes 2P-1 visits to come up again,
    and each stage runs two in the time of a micro-batch.

    Args:
        stages: P, at least 1. With one stage D(k) and A(k) are the halves of one walk.
        micro_batches: M, at least 1; may be fewer than the stages.
        backward: False for a forward-only step, whose visits have no backward.

    Raises:
        ValueError: no stages or no micro-batches.
    """
    for name, value in (("stages", stages), ("micro_batches", micro_batches)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    return tuple(tuple(_visits(stage, stages, micro_batches, backward)) for stage in range(stages))


def _visits(stage: int, stages: int, micro_batches: int, backward: bool) -> Iterator[Visit]:
    rounds = micro_batches + (stages if backward else 0)
    ahead = stages - 1 - stage
    for index in range(rounds + ahead):
        for way, k in (
            (Way.DESCENDING, index),
            (Way.ASCENDING, index - ahead),
        ):
            if not 0 <= k < rounds:
                continue
            forward = k if k < micro_batches else None
            behind = k - stages if backward and k >= stages else None
            if forward is not None or behind is not None:
                yield Visit(way, forward, behind)


def arrivals(visit: Visit, stage: int, stages: int) -> dict[Edge, int]:
    """Return the edges that bring a visit its tensors, and the micro-batch that each brings."""
    descends = visit.way is Way.DESCENDING
    source = stage - 1 if descends else stage + 1
    return _transfers(visit, source, stage) if 0 <= source < stages else {}


def departures(visit: Visit, stage: int, stages: int) -> dict[Edge, int]:
    """Return the edges that take a visit's tensors on, and the micro-batch that each takes."""
    descends = visit.way is Way.DESCENDING
    target = stage + 1 if descends else stage - 1
    return _transfers(visit, stage, target) if 0 <= target < stages else {}


def _transfers(visit: Visit, source: int, target: int) -> dict[Edge, int]:
    found = ((Edge(source, target, strand), visit.micro_batch(strand)) for strand in Strand)
    return {edge: k for edge, k in found if k is not None}


def live_activations(visits: Sequence[Visit]) -> list[int]:
    """Count the chunks of micro-batches that a stage holds activations of, after each visit.

    While a visit runs, its forward fills what its backward frees, so that the stage holds at most
    one more than before the visit.
    """
    live = 0
    counts = []
    for visit in visits:
        live += (visit.forward is not None) - (visit.backward is not None)
        counts.append(live)
    return counts


def peak_activations(visits: Sequence[Visit]) -> int:
    """Count the most chunks of micro-batches whose activations a stage holds while a visit runs.

    With M ≥ 2P it is 2P+1 on every stage: chunk s is held while 2P-s micro-batches pass, chunk
    2P-1-s while s+1 do. Each is 1/(2P) of the model, so a stage holds about what it would for one
    micro-batch through the whole model.
    """
    after = live_activations(visits)
    before = [0, *after[:-1]]
    rises = (visit.forward is not None for visit in visits)
    return max(live + rise for live, rise in zip(before, rises, strict=True))
