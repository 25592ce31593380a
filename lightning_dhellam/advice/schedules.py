"""The schedule that a run with `schedule="auto"` would find: played, as that search predicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lightning_dhellam.advice.priceable import Priceable
from lightning_dhellam.memory import RankMemory
from lightning_dhellam.memory.fitting import KNOWN_SHARE
from lightning_dhellam.memory.prediction import FRAGMENTS
from lightning_dhellam.pipeline.schedules import Found, ScheduleError, Scheme, playable
from lightning_dhellam.plan import Builder
from lightning_dhellam.search.cluster.deep import costs_of, remembered
from lightning_dhellam.search.pipeline import SEARCHED, Effort, VisitTable, play, ranked, searched


def settled(
    one: Priceable,
    builders: Mapping[str, Builder],
    memory: tuple[RankMemory, ...],
    effort: Effort | None = None,
) -> tuple[Priceable, tuple[RankMemory, ...]]:
    """Find the fastest schedule of a pipeline whose layers lie as a run's that is to search one.

    Args:
        one: whose step it is.
        builders: orders to choose from.
        memory: of each stage by the schedule that a search begins with.
        effort: how long to search.

    Returns:
        The same with that schedule, and the memory that it takes.
    """
    work = one.work
    placement, count = work.placement, work.micro_batches
    orders = {name: remembered(build) for name, build in builders.items()}
    costs = costs_of(work, one.priced.costs.clocked(1.0), orders, sketch=True)
    schemes: dict[str, Scheme] = {}
    for name, scheme in playable(placement).items():
        try:
            scheme(work.stages, count)
        except ScheduleError:
            continue
        schemes[name] = scheme
    runs = {name: play(make(work.stages, count), costs, one.link) for name, make in schemes.items()}
    usual = runs[one.run.begun]
    room = KNOWN_SHARE * (one.run.memory_limit or one.conditions.device.memory)
    # With activations the slack grows that is assumed beside them.
    limits = [
        use.peak + (room - rank.total) / (1 + FRAGMENTS)
        for use, rank in zip(usual.stages, memory, strict=True)
    ]
    kinds = (VisitTable.of_kinds(costs, placement, stage) for stage in range(work.stages))
    try:
        found = searched(
            placement,
            count,
            VisitTable.joined(kinds),
            one.link,
            limits=limits,
            known=[run.schedule for run in runs.values()],
            effort=effort,
        )
    except ScheduleError:
        pass  # nothing keeps the limits
    else:
        otherwise = schemes[next(iter(ranked(runs, limits)))]
        schemes[SEARCHED] = Found(found, otherwise)
        runs[SEARCHED] = play(found, costs, one.link)
    best = next(iter(ranked(runs, limits)))
    more = [
        round(new.peak - old.peak) for new, old in zip(runs[best].stages, usual.stages, strict=True)
    ]
    taken = tuple(
        replace(rank, activations=rank.activations + extra)
        for rank, extra in zip(memory, more, strict=True)
    )
    return replace(one, work=replace(work, scheme=schemes[best]), schedule=best), taken
