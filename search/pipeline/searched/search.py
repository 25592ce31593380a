"""Finds a schedule: made by rules, made better by moves, judged by the rule that plays all others.

Known schedules are built for forwards and halves of backwards that take equally long. Here every
start, known ones too, is judged on what its visits cost: which passes hide communication beside
each other, which chunks are longer, what a transfer takes, and how much is saved meanwhile.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf

import numpy as np

from lightning_dhellam.pipeline.schedules import Placement, Schedule, ScheduleError, verify
from lightning_dhellam.search.pipeline.links import Link, Links
from lightning_dhellam.search.pipeline.playing import play, wires_of
from lightning_dhellam.search.pipeline.searched.greedy import Rules, constructed
from lightning_dhellam.search.pipeline.searched.letters import Letters, Task, excess, judged
from lightning_dhellam.search.pipeline.searched.moves import annealed
from lightning_dhellam.search.pipeline.visits import VisitCosts

SEARCHED = "searched"
"""What a schedule that was found is called."""
_HEAT = 1e-4
"""First temperature, as a share of a step. With ten times as much it forgets what it began with."""


@dataclass(frozen=True)
class Effort:
    """How long to search. The defaults take some seconds for 8 stages and 32 micro-batches.

    Attributes:
        starts: schedules that are made by rules.
        improved: best starts that are made better.
        moves: moves that are tried on each.
    """

    starts: int = 600
    improved: int = 2
    moves: int = 4000


def searched(
    placement: Placement,
    micro_batches: int,
    costs: VisitCosts,
    link: Link | Links | None = None,
    *,
    limits: Sequence[float] = (),
    reductions: Sequence[float] = (),
    known: Iterable[Schedule] = (),
    effort: Effort | None = None,
    seed: int = 0,
) -> Schedule:
    """Search a schedule. It is never slower than the known ones that keep the limits.

    The same arguments give the same schedule, on every rank.

    Args:
        placement: which stage holds each chunk.
        micro_batches: how many a step has.
        costs: of every kind of visit, such as those of `VisitTable.of_kinds`.
        link: between all stages, or by source and target; transfers are free without.
        limits: most saved activations of each stage, in the unit of `costs`; none if not given.
        reductions: see `play`.
        known: schedules of the same placement to begin with.
        effort: how long to search.
        seed: of the random numbers.

    Raises:
        ScheduleError: no schedule was found that keeps the limits.
    """
    effort = effort or Effort()
    task = Task.of(
        placement, micro_batches, costs, wires_of(placement, costs, link), limits, reductions
    )
    known = [way for schedule in known for way in dict.fromkeys((schedule, schedule.joined()))]
    starts = [letters for schedule in known if (letters := task.read(schedule)) is not None]
    starts += _made(task, random.Random(seed), effort.starts)
    starts = _best(task, starts, effort.improved)
    found = [task.schedule(letters, SEARCHED) for letters in starts if excess(letters, task) == 0.0]
    for number, letters in enumerate(starts):
        better, seconds = annealed(letters, task, effort.moves, _HEAT, 1 + number + seed * 1000)
        if seconds < inf:
            found.append(task.schedule(better, SEARCHED))
    found += [schedule for schedule in known if _fits(schedule, costs, limits)]
    if not found:
        raise ScheduleError(
            "no schedule was found that keeps the limit of memory: give more of it, more stages or"
            " shorter micro-batches"
        )
    best = min(found, key=lambda one: play(one, costs, link, reductions=reductions).seconds)
    verify(best)
    return replace(best, name=SEARCHED)


def _fits(schedule: Schedule, costs: VisitCosts, limits: Sequence[float]) -> bool:
    if not limits:
        return True
    uses = play(schedule, costs).stages
    return all(use.peak <= limit for use, limit in zip(uses, limits, strict=True))


def _best(task: Task, starts: Sequence[Letters], count: int) -> list[Letters]:
    """Return the best starts, of those as fast as each other only one."""
    ranked: dict[tuple[float, ...], Letters] = {}
    for letters in starts:
        key = (excess(letters, task), *judged(letters, task))
        ranked.setdefault(key, letters)
    return [ranked[key] for key in sorted(ranked) if key[1] < inf][:count]


def _made(task: Task, draw: random.Random, count: int) -> list[Letters]:
    """Make schedules by rules that are drawn, in whose memory fewer or more forwards find room."""
    stages = len(task.held)
    units = np.maximum(task.kinds.rise[:, 1:, 0].max(axis=1), 1e-12)
    most = [task.held.shape[1] * stages * share for share in (0.7, 0.85, 1.0, 1.15, 1.5, 2.0)]
    found = []
    for _ in range(count):
        room = np.minimum(task.limits, units * (draw.choice(most) + 1) * (1 + 1e-9))
        rules = Rules(
            patience=draw.choice((0.0, 0.1, 0.3, 0.6, 1.0)),
            early=draw.choice((0.0, 0.5, 1.0, 2.0)),
            late=draw.choice((0.0, 0.25, 0.5, 1.0, 1.5, 2.0, inf)),
            forward=draw.randrange(3),
            backward=draw.randrange(3),
            gap=draw.choice((0.01, 0.3, 0.6, 1.0)),
            owed=draw.choice((0, 2, 4, 8, 1 << 30)),
            pairs=draw.randrange(3),
            ahead=draw.choice((stages, stages + stages // 2, 2 * stages, 1 << 30)),
        )
        letters = constructed(task._replace(limits=room), rules)
        if task.is_whole(letters):
            found.append(letters)
    return found
