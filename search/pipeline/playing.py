"""Plays a schedule on the stages of a pipeline.

A stage carries out its visits in order. A visit starts when the stage is free and all it needs has
arrived; it hands a result on as soon as the strand that made it has ended, which may be before the
visit ends. Transfers go beside visits: a stage sends one message at a time and receives one at a
time. One begins when it is made and its receive is posted, which is done a walk ahead. A stage
waits for the end of what it has sent some walks later, when it wants the memory back; after how
many `sends_ahead` of a schedule says, so that it is hardly ever held up:

    stage 0   |===== 0F3+3B0 =====|== 3F2 ==|
    pp             |--0F3--> |--3B0->
    stage 1                  |===== 1F3+2B1 =====

Where transfers are kernels, they take a share of the compute of both stages while they go, and a
receive takes a smaller one from when it is posted, as it spins on its processors until bytes come.
Copy engines take none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

from lightning_dhellam.pipeline.schedules import (
    Part,
    Placement,
    Schedule,
    Visit,
    Work,
    sends_ahead,
)
from lightning_dhellam.pipeline.schedules.verify import POSTED_AHEAD
from lightning_dhellam.plan import Strand
from lightning_dhellam.search.model.arrays import Array
from lightning_dhellam.search.pipeline import rule
from lightning_dhellam.search.pipeline.links import Link, Links
from lightning_dhellam.search.pipeline.visits import VisitCost, VisitCosts


@dataclass(frozen=True, slots=True)
class VisitInterval:
    """A visit on the timeline of a stage, with its start and end in seconds."""

    works: Visit
    start: float
    end: float


@dataclass(frozen=True)
class StageUse:
    """How a stage spends a step: the first four times add up to the seconds of the step.

    Attributes:
        compute: seconds in which compute works.
        exposed: seconds of visits in which compute idles: their own communication is not hidden.
        transfer: seconds between visits in which what is waited for is on its way from or to a
            stage, and those by which transfers lengthen visits.
        bubble: the other seconds between visits, before the first, and after the last.
        peak: most saved activations at a time.
        works: of each visit, in order.
        starts: of each visit, in seconds.
        ends: of each visit, in seconds.
    """

    compute: float
    exposed: float
    transfer: float
    bubble: float
    peak: float
    works: Sequence[Visit]
    starts: Sequence[float]
    ends: Sequence[float]

    @property
    def intervals(self) -> tuple[VisitInterval, ...]:
        """The visits, in order."""
        times = zip(self.works, self.starts, self.ends, strict=True)
        return tuple(VisitInterval(*one) for one in times)


@dataclass(frozen=True)
class PipelineRun:
    """A step as it was played: what every stage would do.

    Attributes:
        schedule: schedule that was played.
        seconds: seconds from the first visit to the end of the last, or of the last reduction.
        stages: how each stage spends the step.
    """

    schedule: Schedule
    seconds: float
    stages: tuple[StageUse, ...]

    def share(self, part: str) -> list[float]:
        """Return the share of the step that each stage spends on `part`, such as `bubble`."""
        return [getattr(stage, part) / self.seconds for stage in self.stages]


def play(
    schedule: Schedule,
    costs: VisitCosts,
    link: Link | Links | None = None,
    *,
    reductions: Sequence[float] = (),
    unhindered: bool = False,
) -> PipelineRun:
    """Play a step of a schedule that `verify` accepts.

    Args:
        schedule: to play.
        costs: what its visits cost.
        link: between all stages, or by source and target; transfers are free without.
        reductions: seconds in which the gradients of each chunk are reduced, from its last gradient
            of weights on; a stage reduces one chunk at a time. They are the end of a step, as the
            norm of gradients needs all of them.
        unhindered: whether transfers wait for no others, and take nothing from compute: no visit
            then ends later if others are shorter, or their results there earlier.
    """
    kinds, numbers = schedule.kinds
    known = [costs.of(works) for works in kinds]
    visits = _visits(schedule, known)
    lead = 0 if unhindered else sends_ahead(schedule)
    wires = wires_of(schedule.placement, costs, link, lead)
    if unhindered:
        wires = wires._replace(
            carry=np.zeros_like(wires.carry), late=wires.late + wires.carry, takes=0.0, waits=0.0
        )
    starts, ends, waited = rule.run(visits, wires, schedule.micro_batches)
    assert np.isfinite(ends).all(), f"{schedule.name} deadlocks"
    given = np.array(reductions or [0.0] * schedule.chunks, float)
    seconds = float(rule.drained(visits, ends, wires.place, given).max())
    each = np.array([(one.seconds, one.compute, one.rise, one.change) for one in known])[numbers]
    uses = []
    for row, (first, last) in zip(schedule.visits, pairwise(visits.offsets), strict=True):
        own = slice(first, last)
        uses.append(_use(row, starts[own], ends[own], each[own], waited[own].sum(), seconds))
    return PipelineRun(schedule, seconds, tuple(uses))


def wires_of(
    placement: Placement, costs: VisitCosts, link: Link | Links | None = None, lead: int = 0
) -> rule.Wires:
    """Return how results get to other stages.

    Args:
        placement: which stage holds each chunk.
        costs: how large results are.
        link: between all stages, or by source and target; transfers are free without.
        lead: walks after which a stage waits for the end of what it has sent; 0 if it never does.
    """
    carry, late = (np.zeros((placement.chunks, len(_SENT))) for _ in range(2))
    place = placement.stage_of
    used = [Link()]
    for chunk in range(placement.chunks):
        for column, part in enumerate(_SENT):
            work = Work(chunk, part, 0)
            goal = chunk + work.step
            if link is None or not 0 <= goal < placement.chunks or place[goal] == place[chunk]:
                continue
            edge = place[chunk], place[goal]
            carries = link if isinstance(link, Link) else link.get(edge, Link())
            used.append(carries)
            carry[chunk, column] = costs.bytes_sent(work) / carries.bandwidth
            late[chunk, column] = carries.latency
    takes = max(one.takes for one in used)
    waits = max(one.waiting for one in used)
    return rule.Wires(np.array(place), carry, late, takes, waits, POSTED_AHEAD, lead)


def _visits(schedule: Schedule, known: Sequence[VisitCost]) -> rule.Visits:
    _, numbers = schedule.kinds
    ready = [[cost.ready.get(strand, 0.0) for strand in Strand] for cost in known]
    return rule.Visits(
        np.array([0, *accumulate(map(len, schedule.visits))]),
        _numbers(schedule),
        np.array([cost.seconds for cost in known], float)[numbers],
        np.array(ready, float)[numbers],
    )


_SENT = (Part.FORWARD, Part.BACKWARD)
_PARTS = {Part.BACKWARD: rule.WHOLE, Part.INPUT: rule.INPUT, Part.WEIGHT: rule.WEIGHT}


def _numbers(schedule: Schedule) -> Array:
    """The works of every visit, as `rule.Visits` has them."""
    kinds, numbers = schedule.kinds
    each = np.full((len(kinds), 5), -1)
    each[:, 4] = rule.WHOLE
    column = np.full((len(kinds), 2), -1)  # where the micro-batch of each work goes
    for kind, works in enumerate(kinds):
        for place, work in enumerate(works):
            if work.part is Part.FORWARD:
                each[kind, 0], column[kind, place] = work.chunk, 1
            else:
                each[kind, [2, 4]] = work.chunk, _PARTS[work.part]
                column[kind, place] = 3
    rows, every = each[numbers], np.arange(len(numbers))
    for place in range(2):
        there = column[numbers, place] >= 0
        own = every[there]
        rows[own, column[numbers, place][there]] = schedule.micro_batches_of[there, place]
    return rows


def _use(
    row: Sequence[Visit], starts: Array, ends: Array, each: Array, waited: float, seconds: float
) -> StageUse:
    """How a stage spends a step; of `each` visit seconds, compute, rise and change."""
    visits, compute = (float(column.sum()) for column in each.T[:2])
    lasted = float((ends - starts).sum())
    saved = np.cumsum(each[:, 3])
    peak = float((saved - each[:, 3] + each[:, 2]).max(initial=0.0))
    return StageUse(
        compute,
        visits - compute,
        float(waited) + lasted - visits,
        seconds - lasted - float(waited),
        peak,
        row,
        tuple(starts.tolist()),
        tuple(ends.tolist()),
    )
