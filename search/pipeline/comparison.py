"""Every pipeline schedule on the same model, link and machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

from lightning_dhellam.pipeline.schedules import (
    SCHEDULES,
    Schedule,
    ScheduleError,
    Scheme,
    interleaved_1f1b,
    verify,
)
from lightning_dhellam.plan import BUILDERS, Builder, GraphPair
from lightning_dhellam.search.model import Costs
from lightning_dhellam.search.pipeline.layers import cut, cut_folded
from lightning_dhellam.search.pipeline.playing import Link, PipelineRun, play
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
    """

    layers: Sequence[GraphPair]
    costs: Costs
    stages: int
    micro_batches: int
    tokens: int
    link: Link
    rounds: int = 2
    builders: Mapping[str, Builder] = field(default_factory=BUILDERS.copy)


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
        refused: why the others are not defined, by name.
    """

    compared: Mapping[str, Compared]
    refused: Mapping[str, str]


def compare(setting: Setting) -> Comparison:
    """Play every schedule that is defined for these numbers.

    Raises:
        ValueError: not one of them is.
    """
    compared: dict[str, Compared] = {}
    refused: dict[str, str] = {}
    for name, make in _schedules(setting.rounds).items():
        try:
            schedule = make(setting.stages, setting.micro_batches)
            chunks = _cut(setting, schedule)
        except ValueError as error:
            refused[name] = str(error)
            continue
        verify(schedule)
        compared[name] = _compared(setting, schedule, chunks)
    if not compared:
        raise ScheduleError(next(iter(refused.values())))
    return Comparison(compared, refused)


def _schedules(rounds: int) -> dict[str, Scheme]:
    return {**SCHEDULES, "interleaved-1f1b": partial(interleaved_1f1b, rounds=rounds)}


def _cut(setting: Setting, schedule: Schedule) -> list[tuple[GraphPair, ...]]:
    """Cut chunks of equal time, or stages of equal time where both ends share a stage."""
    if schedule.placement.is_folded:
        return cut_folded(setting.layers, setting.costs, setting.stages)
    return cut(setting.layers, setting.costs, schedule.chunks)


def _compared(
    setting: Setting, schedule: Schedule, chunks: Sequence[Sequence[GraphPair]]
) -> Compared:
    """Play a schedule. Halves of a backward that follow each other are joined if that is faster."""
    costs = LayerCosts(chunks, setting.costs, tokens=setting.tokens, builders=setting.builders)
    ways = (schedule.joined(), schedule)
    played = min((play(way, costs, setting.link) for way in ways), key=lambda way: way.seconds)
    orders: dict[int, dict[str, None]] = {}
    for row in played.schedule.visits:
        for works in row:
            orders.setdefault(len(works), {})[costs.order_of(works)] = None
    return Compared(played, {n: tuple(names) for n, names in sorted(orders.items())}, costs.sized)
