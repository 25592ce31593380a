"""Every pipeline schedule on the same model, link and machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from lightning_dhellam.pipeline.schedules import (
    SCHEDULES,
    Placement,
    Schedule,
    ScheduleError,
    Scheme,
    interleaved_1f1b,
    verify,
)
from lightning_dhellam.plan import BUILDERS, Builder, GraphPair
from lightning_dhellam.search.model import Costs
from lightning_dhellam.search.pipeline.layers import cut, cut_folded
from lightning_dhellam.search.pipeline.links import Link
from lightning_dhellam.search.pipeline.playing import PipelineRun, play
from lightning_dhellam.search.pipeline.ranking import Ranked, ranked
from lightning_dhellam.search.pipeline.searched import SEARCHED, Effort, searched
from lightning_dhellam.search.pipeline.visits import LayerCosts


@dataclass(frozen=True)
class Setting:
    """The conditions under which schedules are compared.

    Attributes:
        layers: layers of the model, first to last.
        costs: what their operators cost.
        stages: how many stages the pipeline has.
        micro_batches: how many micro-batches a step has.
        tokens: how many tokens a micro-batch has.
        link: link between neighbouring stages.
        rounds: how many chunks a stage has in interleaved-1f1b.
        builders: orders of which each visit gets the fastest.
        limit: most saved activations of a stage; None if there is no limit.
        effort: how long to search a schedule of folded layers; None if none is to be searched.
    """

    layers: Sequence[GraphPair]
    costs: Costs
    stages: int
    micro_batches: int
    tokens: int
    link: Link
    rounds: int = 2
    builders: Mapping[str, Builder] = field(default_factory=BUILDERS.copy)
    limit: float | None = None
    effort: Effort | None = None


@dataclass(frozen=True)
class Compared:
    """One schedule of a comparison.

    Attributes:
        run: the step under it.
        orders: names of the orders that its visits have, by number of strands.
        sized: whether memory is in bytes, or else in layers of a micro-batch.
    """

    run: PipelineRun
    orders: Mapping[int, tuple[str, ...]]
    sized: bool


@dataclass(frozen=True)
class Comparison:
    """All schedules that were compared.

    Attributes:
        compared: schedules that are defined for the numbers of the setting, by name.
        refused: why the others are not defined, or not found, by name.
        ranking: the same schedules, the best first, and why each other one is behind it.
    """

    compared: Mapping[str, Compared]
    refused: Mapping[str, str]
    ranking: Mapping[str, Ranked]


def compare(setting: Setting) -> Comparison:
    """Play every schedule that is defined for these numbers, and the searched one.

    Raises:
        ValueError: not one of them is.
    """
    compared: dict[str, Compared] = {}
    refused: dict[str, str] = {}
    known: dict[Placement, LayerCosts] = {}
    for name, make in _schedules(setting.rounds).items():
        try:
            schedule = make(setting.stages, setting.micro_batches)
            costs = known.get(schedule.placement) or _costs(setting, schedule.placement)
        except ValueError as error:
            refused[name] = str(error)
            continue
        known[schedule.placement] = costs
        verify(schedule)
        compared[name] = _compared(setting, schedule, costs)
    if not compared:
        raise ScheduleError(next(iter(refused.values())))
    limits = _limits(setting)
    folded = Placement.folded(setting.stages)
    if setting.effort is not None and folded in known:
        ways = [one.run.schedule for one in compared.values()]
        try:
            found = searched(
                folded,
                setting.micro_batches,
                known[folded],
                setting.link,
                limits=limits,
                known=[schedule for schedule in ways if schedule.placement == folded],
                effort=setting.effort,
            )
            compared[found.name] = _compared(setting, found, known[folded])
        except ScheduleError as error:
            refused[SEARCHED] = str(error)
    runs = {name: one.run for name, one in compared.items()}
    return Comparison(compared, refused, ranked(runs, limits))


def _limits(setting: Setting) -> tuple[float, ...]:
    return () if setting.limit is None else (setting.limit,) * setting.stages


def _schedules(rounds: int) -> dict[str, Scheme]:
    return {**SCHEDULES, "interleaved-1f1b": partial(interleaved_1f1b, rounds=rounds)}


def _costs(setting: Setting, placement: Placement) -> LayerCosts:
    """Cut chunks of equal time, or stages of equal time where both ends share a stage."""
    if placement.is_folded:
        chunks = cut_folded(setting.layers, setting.costs, setting.stages)
    else:
        chunks = cut(setting.layers, setting.costs, placement.chunks)
    return LayerCosts(chunks, setting.costs, tokens=setting.tokens, builders=setting.builders)


def _compared(setting: Setting, schedule: Schedule, costs: LayerCosts) -> Compared:
    """Play a schedule. Halves of a backward that follow each other are joined if that is faster."""
    ways = (schedule.joined(), schedule)
    played = min((play(way, costs, setting.link) for way in ways), key=lambda way: way.seconds)
    orders: dict[int, dict[str, None]] = {}
    for row in played.schedule.visits:
        for works in row:
            orders.setdefault(len(works), {})[costs.order_of(works)] = None
    return Compared(played, {n: tuple(names) for n, names in sorted(orders.items())}, costs.sized)
