"""A step of all ranks, played: layers of equal ranks once, then the stages, then what ends a step.

Ranks of a stage are alike, and so are stages with as many layers between the two ends: thousands of
ranks are as few kinds of visits. What the machine model plays of those is put together by the
pipeline's schedule; behind it come the reduction of gradients, as far as nothing hides it, and the
optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from lightning_dhellam.pipeline.schedules import Schedule
from lightning_dhellam.plan import Builder, Lane
from lightning_dhellam.search.cluster.beginning import beginning
from lightning_dhellam.search.cluster.deep import Deep, costs_of, remembered
from lightning_dhellam.search.cluster.ending import Groups, optimizer, reduction_of
from lightning_dhellam.search.cluster.least import least_alone
from lightning_dhellam.search.cluster.machine import Machine
from lightning_dhellam.search.cluster.tail import tail_of
from lightning_dhellam.search.cluster.work import THIN, Work
from lightning_dhellam.search.model import Costs, simulate
from lightning_dhellam.search.pipeline import LayerCosts, Link, PipelineRun, VisitTable, play
from lightning_dhellam.search.pipeline.visits import Played as PlayedVisits
from lightning_dhellam.search.pipeline.visits import VisitCosts

_FEW = 3
"""Micro-batches that are played of a step without a pipeline; further ones are like the last."""
_CLOCK_ROUNDS = 2


Visits = dict[float, PlayedVisits]
"""Visits that were played, by how much slower the device's clock had become."""


@dataclass(frozen=True)
class Straggler:
    """One rank of the first stage that is slower than the others, for which all others wait.

    Attributes:
        costs: what operators cost on it.
        machine: that it runs on.
    """

    costs: Costs
    machine: Machine


@dataclass(frozen=True)
class Stage:
    """How a stage spends a step, in seconds; see `StagePrediction`."""

    compute: float
    exposed: float
    transfer: float
    bubble: float
    reduction: float
    optimizer: float


@dataclass(frozen=True)
class Played:
    """A step as it was played.

    Attributes:
        seconds: of all of it.
        stages: how each spends it.
        plan: names of the plans that its visits have.
        usual: the plan of most of the time in which most strands are in flight.
        reduced: seconds in which gradients are reduced, of the stage that does so longest.
        gathered: seconds in which new weights are gathered.
        run: the pipeline; None without one.
    """

    seconds: float
    stages: tuple[Stage, ...]
    plan: str
    usual: str
    reduced: float
    gathered: float
    run: PipelineRun | None = None


def played(
    work: Work,
    costs: Costs,
    builders: Mapping[str, Builder],
    machine: Machine,
    groups: Groups,
    *,
    link: Link | None = None,
    slow: Straggler | None = None,
    sketch: bool = False,
    known: Visits | None = None,
) -> Played:
    """Play a step.

    Args:
        work: of the step.
        costs: what operators cost.
        builders: orders; a step gets the fastest, with a pipeline each of its visits.
        machine: that ranks run on.
        groups: over which gradients are added up.
        link: between stages.
        slow: a rank of the first stage, if there is a straggler.
        sketch: whether to play few layers of many that are alike, and go on from there.
        known: visits that were played already for steps with the same layers, costs and orders;
            those of this step are added.

    Raises:
        ScheduleError: the schedule is not defined for these numbers.
    """
    machines = [machine] * work.stages
    if slow is not None:
        machines[0] = slow.machine
    if work.stages == 1:
        costs = costs if slow is None else slow.costs
        found = _alone(work, costs, builders, machines[0], groups, sketch)
    else:
        known = {} if known is None else known
        late = None if slow is None else slow.costs
        found = _staged(work, costs, builders, machines, groups, link, late, sketch, known)
    first = beginning(work, machines[work.placement.first])
    stages = (replace(stage, compute=stage.compute + first) for stage in found.stages)
    return replace(found, seconds=found.seconds + first, stages=tuple(stages))


def _alone(
    work: Work,
    costs: Costs,
    builders: Mapping[str, Builder],
    machine: Machine,
    groups: Groups,
    sketch: bool,
) -> Played:
    """A step without a pipeline: the plan is the fastest of a sketch."""
    depth = len(work.layers) - 2
    builders = {name: remembered(build) for name, build in builders.items()}
    thinner, thin = (work.shallow(count) if work.is_deep else work for count in THIN)
    found = {name: _steady(thin, build, costs)[0] for name, build in builders.items()}
    plan = min(found, key=lambda name: found[name])
    build = builders[plan]
    if sketch and work.is_deep:
        few, more = THIN
        both = [_steady(one, build, costs) for one in (thinner, thin)]
        times = (depth - more) / (more - few)
        bare, compute = (b + (b - a) * times for a, b in zip(*both, strict=True))
    else:
        bare, compute = _steady(work, build, costs)
    bare = max(bare, least_alone(work, costs))
    tail = tail_of(work, build, costs, groups, sketch=sketch)
    last, gathered = optimizer(work, range(len(work.layers)), machine, groups)
    busy = reduction_of(work, range(len(work.layers)), groups)
    stage = Stage(compute, bare - compute, 0.0, 0.0, tail, last)
    return Played(bare + tail + last, (stage,), plan, plan, busy, gathered)


def _steady(work: Work, build: Builder, costs: Costs) -> tuple[float, float]:
    """Seconds of a step up to its last gradient, and of compute in it."""
    found = []
    for count in sorted({min(work.micro_batches, n) for n in (_FEW - 1, _FEW)}):
        step = simulate(
            work.layers,
            build,
            costs,
            micro_batches=count,
            tokens=work.tokens,
        )
        found.append((step.seconds, step.busy[Lane.COMPUTE]))
    more = max(0, work.micro_batches - _FEW)
    seconds, compute = (found[-1][n] + more * (found[-1][n] - found[0][n]) for n in (0, 1))
    return seconds, compute


def _staged(
    work: Work,
    costs: Costs,
    builders: Mapping[str, Builder],
    machines: Sequence[Machine],
    groups: Groups,
    link: Link | None,
    slow: Costs | None,
    sketch: bool,
    known: Visits,
) -> Played:
    schedule = work.schedule
    work.verify()
    builders = {name: remembered(build) for name, build in builders.items()}
    reduced = [reduction_of(work, chunk, groups) for chunk in work.chunks]
    stages = range(work.stages)
    share = 1.0
    for _ in range(_CLOCK_ROUNDS):
        before_now = known.setdefault(costs.clock.slowdown(share), {})
        usual = costs_of(work, costs.clocked(share), builders, sketch, before_now)
        table: VisitCosts = usual
        if slow is not None:
            late = costs_of(work, slow.clocked(share), builders, sketch)
            tables = [VisitTable.of_stage(usual, schedule, s) for s in stages]
            table = VisitTable.joined((*tables, VisitTable.of_stage(late, schedule, 0)))
        run = play(schedule, table, link)
        before, share = share, sum(run.share("compute")) / work.stages
        if sketch:
            share = round(share, 2)  # so that other steps meet the same visits
        if costs.clock.slowdown(before) == costs.clock.slowdown(share):
            break
    whole = play(schedule, table, link, reductions=reduced) if any(reduced) else run
    tail = max(0.0, whole.seconds - run.seconds)
    ends = [optimizer(work, [*work.of_stage(s)], machines[s], groups) for s in stages]
    last = max(end for end, _ in ends)
    found = tuple(
        Stage(use.compute, use.exposed, use.transfer, use.bubble, tail, last) for use in run.stages
    )
    held = [work.placement.held(s) for s in stages]
    busy = max(sum(reduced[chunk] for chunk in own) for own in held)
    gathered = max(seconds for _, seconds in ends)
    orders = _orders(schedule, usual)
    plan = ", ".join(sorted({name for _, name in orders}))
    most = max(strands for strands, _ in orders)
    _, longest = max(
        (seconds, name) for (strands, name), seconds in orders.items() if strands == most
    )
    return Played(run.seconds + tail + last, found, plan, longest, busy, gathered, run)


def _orders(schedule: Schedule, costs: LayerCosts | Deep) -> dict[tuple[int, str], float]:
    """Seconds of visits by how many strands they have, and by the name of their order."""
    found: dict[tuple[int, str], float] = {}
    kinds, numbers = schedule.kinds
    for works, count in zip(kinds, np.bincount(numbers).tolist(), strict=True):
        key = len(works), costs.order_of(works)
        if key[1] != "nothing":
            found[key] = found.get(key, 0.0) + count * costs.of(works).seconds
    return found
