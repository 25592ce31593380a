"""Proof on paper that a schedule can run: complete, in order on every edge, no deadlock.

What waits for what is a graph over the starts and ends of all visits. Where it has no cycle, every
visit runs, whatever the times are:

    start → end → the next visit's start           a stage runs one visit at a time
    end of a visit → start of the one it sends to  nothing starts before all its tensors are there
    start of a visit → start two visits after      a send needs its receive, which is posted one
    the one that sends to the visit after it       visit ahead; a sender may be two visits ahead
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lightning_dhellam.pipeline.schedule import Edge, Schedule, Visit, arrivals, departures
from lightning_dhellam.plan.operator import Strand

POSTED_AHEAD = 1
"""Visits between the posting of a receive and the visit that needs it."""

SENDS_AHEAD = 2
"""Visits after which a sender waits for its transfer, whose memory it wants back."""


class ScheduleError(ValueError):
    """A schedule that cannot run."""


class _Moment(NamedTuple):
    stage: int
    number: int
    ends: bool

    def __str__(self) -> str:
        return f"{'end' if self.ends else 'start'} of visit {self.number} on stage {self.stage}"


def verify(schedule: Schedule, micro_batches: int, *, backward: bool = True) -> None:
    """Prove that `schedule` runs every micro-batch and never waits for ever.

    Raises:
        ScheduleError: naming the stage, edge or visits that cannot be.
    """
    for stage, visits in enumerate(schedule):
        _check_complete(stage, len(schedule), visits, micro_batches, backward)
    sent, received = _traffic(schedule)
    for edge in dict.fromkeys((*sent, *received)):  # in the same order on every run
        out, into = ([k for k, _ in side[edge]] for side in (sent, received))
        if out != into:
            raise ScheduleError(f"edge {edge}: sends {out}, receives {into}")
    _check_no_cycle(schedule, sent, received)


def _check_complete(
    stage: int, stages: int, visits: Sequence[Visit], micro_batches: int, backward: bool
) -> None:
    """Check that both chunks take every micro-batch once, in order, and in that of the layers."""
    done: dict[tuple[Strand, int], list[int]] = defaultdict(list)
    for index, visit in enumerate(visits):
        for strand in Strand:
            k = visit.micro_batch(strand)
            if k is None:
                continue
            chunk = visit.chunk(strand, stage, stages)
            for before in _locally_before(strand, chunk, stage, stages):
                if k not in done[before]:
                    raise ScheduleError(
                        f"visit {index} ({visit}) on stage {stage} comes before"
                        f" {before[0]} of micro-batch {k} through chunk {before[1]}"
                    )
            done[strand, chunk].append(k)
    needed = tuple(Strand) if backward else (Strand.FORWARD,)
    for strand in needed:
        for chunk in (stage, 2 * stages - 1 - stage):
            if done[strand, chunk] != list(range(micro_batches)):
                raise ScheduleError(
                    f"stage {stage} takes micro-batches {done[strand, chunk]} {strand} through"
                    f" chunk {chunk}, not 0 to {micro_batches - 1} in order"
                )


def _locally_before(
    strand: Strand, chunk: int, stage: int, stages: int
) -> Iterator[tuple[Strand, int]]:
    """Give what the same stage must have done with a micro-batch before this."""
    turns = stage == stages - 1
    if strand is Strand.BACKWARD:
        yield Strand.FORWARD, chunk
        if turns and chunk == stage:
            yield Strand.BACKWARD, chunk + 1
    elif turns and chunk == stages:
        yield Strand.FORWARD, chunk - 1


_Traffic = dict[Edge, list[tuple[int, int]]]
"""For each edge its micro-batches, and the index of the visit of each."""


def _traffic(schedule: Schedule) -> tuple[_Traffic, _Traffic]:
    sent: _Traffic = defaultdict(list)
    received: _Traffic = defaultdict(list)
    stages = len(schedule)
    for stage, visits in enumerate(schedule):
        for index, visit in enumerate(visits):
            for edge, k in departures(visit, stage, stages).items():
                sent[edge].append((k, index))
            for edge, k in arrivals(visit, stage, stages).items():
                received[edge].append((k, index))
    return sent, received


def _check_no_cycle(schedule: Schedule, sent: _Traffic, received: _Traffic) -> None:
    waits: dict[_Moment, set[_Moment]] = defaultdict(set)
    for stage, visits in enumerate(schedule):
        for index in range(len(visits)):
            waits[_Moment(stage, index, True)].add(_Moment(stage, index, False))
            if index:
                waits[_Moment(stage, index, False)].add(_Moment(stage, index - 1, True))
    for edge, departed in sent.items():
        for (_, out), (_, into) in zip(departed, received[edge], strict=True):
            start = _Moment(edge.target, into, False)
            waits[start].add(_Moment(edge.source, out, True))
            posted = _Moment(edge.target, max(0, into - POSTED_AHEAD), False)
            if out + SENDS_AHEAD < len(schedule[edge.source]):
                waits[_Moment(edge.source, out + SENDS_AHEAD, False)].add(posted)
    _run(waits, sum(2 * len(visits) for visits in schedule))


def _run(waits: dict[_Moment, set[_Moment]], count: int) -> None:
    """Let every moment pass that waits for none that has not."""
    followers: dict[_Moment, list[_Moment]] = defaultdict(list)
    left = {moment: len(before) for moment, before in waits.items()}
    for moment, before in waits.items():
        for earlier in before:
            followers[earlier].append(moment)
    ready = [moment for moment in followers if not left.get(moment)]
    passed = set(ready)
    while ready:
        for moment in followers[ready.pop()]:
            left[moment] -= 1
            if not left[moment]:
                ready.append(moment)
                passed.add(moment)
    if len(passed) != count:
        stuck = sorted(moment for moment in waits if moment not in passed)
        held = [str(moment) for moment in stuck[:4]]
        raise ScheduleError(f"deadlock: nothing gets past {', '.join(held)}")
