"""Schedules as rows of letters, in which a search moves: micro-batches are counted, not written.

A letter is a visit: the chunk of a stage that goes forward, and the chunk and the part that goes
backward. A chunk takes the micro-batches in order, so the k-th time that a letter of a chunk and a
part stands in a row it is for micro-batch k; a `W` is for the oldest whose `I` has been.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from lightning_dhellam.pipeline.schedules import (
    Part,
    Placement,
    Schedule,
    ScheduleError,
    Visit,
    Work,
)
from lightning_dhellam.plan import Strand
from lightning_dhellam.search.model.arrays import Array, compiled
from lightning_dhellam.search.pipeline.rule import (
    INPUT,
    WEIGHT,
    WHOLE,
    Visits,
    Wires,
    drained,
    run,
)
from lightning_dhellam.search.pipeline.visits import VisitCosts, kinds_of

PARTS = 3
"""Parts of a backward: the letter of part p of the stage's chunk c is `PARTS * c + p`."""


class Letters(NamedTuple):
    """The rows of all stages.

    Attributes:
        rows: of each stage and place in its row the chunk that goes forward, by number among those
            of the stage, and the letter that goes backward; -1 for none.
        length: how many letters each row has.
    """

    rows: Array
    length: Array


class Kinds(NamedTuple):
    """What letters cost, by stage, chunk that goes forward plus 1, and letter backward plus 1.

    Attributes:
        seconds: seconds of a visit; infinite if it may not be.
        ready: seconds until its results are there, of forward and backward.
        rise: how far saved activations grow above what they were before, at most.
        change: by how much they have grown at the end.
    """

    seconds: Array
    ready: Array
    rise: Array
    change: Array


class Task(NamedTuple):
    """What a schedule is searched for.

    Attributes:
        held: chunks of each stage, in order.
        micro_batches: how many a step has.
        kinds: what letters cost.
        wires: how results get to other stages.
        limits: most saved activations of each stage.
        reductions: seconds in which the gradients of each chunk are reduced.
    """

    held: Array
    micro_batches: int
    kinds: Kinds
    wires: Wires
    limits: Array
    reductions: Array

    @classmethod
    def of(
        cls,
        placement: Placement,
        micro_batches: int,
        costs: VisitCosts,
        wires: Wires,
        limits: Sequence[float] = (),
        reductions: Sequence[float] = (),
    ) -> Task:
        """Ask what every letter costs.

        Raises:
            ScheduleError: stages hold different numbers of chunks.
        """
        held = [placement.held(stage) for stage in range(placement.stages)]
        if len({len(chunks) for chunks in held}) > 1:
            raise ScheduleError(f"chunks on stages {placement}: as many are needed on every stage")
        shape = len(held), len(held[0]) + 1, PARTS * len(held[0]) + 1
        kinds = Kinds(
            np.full(shape, np.inf), np.zeros((*shape, 2)), np.zeros(shape), np.zeros(shape)
        )
        for stage, chunks in enumerate(held):
            for works in kinds_of(placement, stage):
                cost = costs.of(works)
                ahead, behind = _letter(works, chunks)
                at = stage, ahead + 1, behind + 1
                kinds.seconds[at], kinds.rise[at], kinds.change[at] = (
                    cost.seconds,
                    cost.rise,
                    cost.change,
                )
                kinds.ready[at] = [cost.ready.get(strand, 0.0) for strand in Strand]
        return cls(
            np.array(held),
            micro_batches,
            kinds,
            wires,
            np.array(limits or [np.inf] * len(held), float),
            np.array(reductions or [0.0] * placement.chunks, float),
        )

    def read(self, schedule: Schedule) -> Letters | None:
        """Return the letters of a schedule; None if it has a visit that no letter stands for."""
        letters = self.blank()
        for stage, row in enumerate(schedule.visits):
            for place, works in enumerate(row):
                ahead, behind = _letter(works, self.held[stage].tolist())
                if not np.isfinite(self.kinds.seconds[stage, ahead + 1, behind + 1]):
                    return None
                letters.rows[stage, place] = ahead, behind
            letters.length[stage] = len(row)
        return letters

    def blank(self) -> Letters:
        """Return rows with room for any schedule."""
        stages, chunks = self.held.shape
        room = PARTS * chunks * self.micro_batches + 2
        return Letters(np.full((stages, room, 2), -1), np.zeros(stages, np.int64))

    def schedule(self, letters: Letters, name: str) -> Schedule:
        """Return the schedule that letters stand for."""
        visits = spelt(letters, self)
        rows = []
        for first, last in pairwise(visits.offsets):
            rows.append(tuple(map(_visit, visits.works[first:last].tolist())))
        placement = Placement(tuple(self.wires.place.tolist()))
        return Schedule(name, self.micro_batches, placement, tuple(rows))

    def is_whole(self, letters: Letters) -> bool:
        """Whether every micro-batch passes every chunk, both ways, and no W is left."""
        needed = self.held.size * self.micro_batches
        counts = np.zeros(1 + PARTS, np.int64)
        for row, length in zip(letters.rows, letters.length, strict=True):
            forward, backward = row[:length].T
            counts[PARTS] += (forward >= 0).sum()
            counts[:PARTS] += np.bincount(backward[backward >= 0] % PARTS, minlength=PARTS)
        whole, halves, weights, forwards = counts.tolist()
        return forwards == needed == whole + halves and halves == weights


_PARTS = {Part.BACKWARD: WHOLE, Part.INPUT: INPUT, Part.WEIGHT: WEIGHT}
_WRITTEN = {number: part for part, number in _PARTS.items()}


def _letter(works: Visit, chunks: Sequence[int]) -> tuple[int, int]:
    ahead, behind = -1, -1
    for work in works:
        if work.part is Part.FORWARD:
            ahead = chunks.index(work.chunk)
        else:
            behind = PARTS * chunks.index(work.chunk) + _PARTS[work.part]
    return ahead, behind


def _visit(works: Sequence[int]) -> Visit:
    visit: Visit = ()
    if works[0] >= 0:
        visit += (Work(works[0], Part.FORWARD, works[1]),)
    if works[2] >= 0:
        visit += (Work(works[2], _WRITTEN[works[4]], works[3]),)
    return visit


@compiled
def spelt(letters, task):  # type: ignore[no-untyped-def]
    """Return the visits that letters stand for; none if a row has a W before its I, or a whole
    backward while a W of its chunk is left: gradients are added in the order of micro-batches."""
    rows, length = letters.rows, letters.length
    stages, chunks = len(length), task.held.shape[1]
    count = length.sum()
    offsets = np.zeros(stages + 1, np.int64)
    works = np.full((count, 5), -1)
    seconds, ready = np.zeros(count), np.zeros((count, 2))
    done = np.zeros((chunks, 1 + PARTS), np.int64)
    split = np.zeros((chunks, task.micro_batches), np.int64)
    at = 0
    for stage in range(stages):
        offsets[stage] = at
        done[:] = 0
        for place in range(length[stage]):
            ahead, behind = rows[stage, place, 0], rows[stage, place, 1]
            works[at, 4] = WHOLE
            if ahead >= 0:
                works[at, 0], works[at, 1] = task.held[stage, ahead], done[ahead, 0]
                done[ahead, 0] += 1
            if behind >= 0:
                chunk, part = behind // PARTS, behind % PARTS
                works[at, 2], works[at, 4] = task.held[stage, chunk], part
                if part == WEIGHT:
                    if done[chunk, 2] == done[chunk, 3]:
                        return Visits(offsets, works[:0], seconds, ready)
                    works[at, 3] = split[chunk, done[chunk, 2]]
                    done[chunk, 2] += 1
                else:
                    if part == WHOLE and done[chunk, 2] < done[chunk, 3]:
                        return Visits(offsets, works[:0], seconds, ready)
                    works[at, 3] = done[chunk, 1]
                    if part == INPUT:
                        split[chunk, done[chunk, 3]] = done[chunk, 1]
                        done[chunk, 3] += 1
                    done[chunk, 1] += 1
            seconds[at] = task.kinds.seconds[stage, ahead + 1, behind + 1]
            ready[at, 0] = task.kinds.ready[stage, ahead + 1, behind + 1, 0]
            ready[at, 1] = task.kinds.ready[stage, ahead + 1, behind + 1, 1]
            at += 1
    offsets[stages] = at
    return Visits(offsets, works, seconds, ready)


@compiled
def excess(letters, task):  # type: ignore[no-untyped-def]
    """Return by which share of their limits stages hold too much, in sum."""
    total = 0.0
    for stage in range(len(letters.length)):
        saved = peak = 0.0
        for place in range(letters.length[stage]):
            ahead, behind = letters.rows[stage, place, 0] + 1, letters.rows[stage, place, 1] + 1
            peak = max(peak, saved + task.kinds.rise[stage, ahead, behind])
            saved += task.kinds.change[stage, ahead, behind]
        total += max(0.0, peak / task.limits[stage] - 1.0)
    return total


@compiled
def judged(letters, task):  # type: ignore[no-untyped-def]
    """Return the seconds of a step, and the mean of the seconds after which stages are done."""
    visits = spelt(letters, task)
    if not len(visits.works):
        return np.inf, np.inf
    ends = run(visits, task.wires, task.micro_batches)[1]
    over = drained(visits, ends, task.wires.place, task.reductions)
    return over.max(), over.mean()
