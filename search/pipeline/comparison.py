"""Every pipeline schedule on the same model, link and machine: as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lightning_dhellam.files import save_text
from lightning_dhellam.plan import BUILDERS, Builder, GraphPair
from lightning_dhellam.search.model.cost import Costs
from lightning_dhellam.search.pipeline.chunks import cut, cut_folded
from lightning_dhellam.search.pipeline.passes import LayerCosts
from lightning_dhellam.search.pipeline.schedules import (
    Schedule,
    ScheduleError,
    check,
    dual_pipe_v,
    fold,
    interleaved_1f1b,
    joined,
    one_f_one_b,
    zero_bubble_v,
)
from lightning_dhellam.search.pipeline.schedules.folded import places
from lightning_dhellam.search.pipeline.stages import Link, PipelineRun, StageUse, run
from lightning_dhellam.search.report.outcomes import time_text

FORMAT = 1
_GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """What is simulated.

    Attributes:
        layers: of the model, first to last.
        costs: of their operators.
        stages: of the pipeline.
        micro_batches: of a step.
        tokens: of a micro-batch.
        link: between stages.
        rounds: chunks that a stage has in interleaved 1F1B.
        builders: orders of which each pass has the fastest.
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
        run: its step.
        orders: names of the orders that its passes have, by number of strands.
        sized: whether memory is in bytes, or else in layers of a micro-batch.
    """

    run: PipelineRun
    orders: Mapping[int, tuple[str, ...]]
    sized: bool


@dataclass(frozen=True)
class Comparison:
    """All schedules.

    Attributes:
        compared: those that are defined here, by name.
        refused: why the others are not, by name.
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
        check(schedule)
        compared[name] = _compared(setting, schedule, chunks)
    if not compared:
        raise ScheduleError(next(iter(refused.values())))
    return Comparison(compared, refused)


def _schedules(rounds: int) -> dict[str, Callable[[int, int], Schedule]]:
    return {
        "1F1B": one_f_one_b,
        "interleaved 1F1B": partial(interleaved_1f1b, rounds=rounds),
        "ZB-V": zero_bubble_v,
        "DualPipeV": dual_pipe_v,
        "fold": fold,
    }


def _cut(setting: Setting, schedule: Schedule) -> list[tuple[GraphPair, ...]]:
    """Chunks of equal time, or where both ends of the model share a stage, stages of equal time."""
    if schedule.stage_of == places(setting.stages):
        return cut_folded(setting.layers, setting.costs, setting.stages)
    return cut(setting.layers, setting.costs, schedule.chunks)


def _compared(
    setting: Setting, schedule: Schedule, chunks: Sequence[Sequence[GraphPair]]
) -> Compared:
    """Halves of a backward that follow each other are one pass if that is faster."""
    costs = LayerCosts(chunks, setting.costs, tokens=setting.tokens, builders=setting.builders)
    ways = dict.fromkeys((joined(schedule), schedule))
    played = min((run(way, costs, setting.link) for way in ways), key=lambda way: way.seconds)
    orders: dict[int, dict[str, None]] = {}
    for row in played.schedule.passes:
        for works in row:
            orders.setdefault(len(works), {})[costs.order_of(works)] = None
    return Compared(played, {n: tuple(names) for n, names in sorted(orders.items())}, costs.sized)


def table(comparison: Comparison) -> str:
    """Step, what each stage spends it on, and memory: means, then bubble and memory by stage."""
    rows = [_row(name, one, comparison) for name, one in comparison.compared.items()]
    head = ["schedule", "step", "speed", "compute", "exposed", "transfer", "bubble", "peak memory"]
    parts = [_aligned([head, *rows])]
    parts.append(_by_stage("bubble", comparison, lambda one, use: _percent(_bubble(one, use))))
    parts.append(_by_stage("peak memory", comparison, lambda one, use: _memory(one, use.peak)))
    parts += [f"{name}: left out: {reason}" for name, reason in comparison.refused.items()]
    return "\n".join(parts)


def _row(name: str, one: Compared, comparison: Comparison) -> list[str]:
    first = next(iter(comparison.compared.values()))
    shares = ("compute", "exposed", "transfer", "bubble")
    return [
        name,
        time_text(one.run.seconds),
        f"{first.run.seconds / one.run.seconds:.2f}×",
        *(_percent(sum(values) / len(values)) for values in map(one.run.share, shares)),
        _memory(one, max(use.peak for use in one.run.stages)),
    ]


def _by_stage(
    title: str, comparison: Comparison, shown: Callable[[Compared, StageUse], str]
) -> str:
    stages = range(len(next(iter(comparison.compared.values())).run.stages))
    rows = [[f"{title} of stage", *map(str, stages)]]
    for name, one in comparison.compared.items():
        rows.append([name, *(shown(one, use) for use in one.run.stages)])
    return "\n" + _aligned(rows)


def _bubble(one: Compared, use: StageUse) -> float:
    return use.bubble / one.run.seconds


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _memory(one: Compared, amount: float) -> str:
    return f"{amount / _GIB:.2f} GiB" if one.sized else f"{amount:g} layers"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]))
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def save(path: Path, comparison: Comparison, conditions: Mapping[str, Any]) -> None:
    """Write what the table shows, with every stage and every pass, as JSON."""
    fields = {
        "format": FORMAT,
        "conditions": conditions,
        "schedules": {name: _fields(one) for name, one in comparison.compared.items()},
        "left_out": comparison.refused,
    }
    save_text(path, json.dumps(fields, indent=1) + "\n")


def _fields(one: Compared) -> dict[str, Any]:
    return {
        "seconds": one.run.seconds,
        "orders": {f"{strands} strands": names for strands, names in one.orders.items()},
        "memory": "bytes" if one.sized else "layers",
        "stages": [
            {
                "compute": use.compute,
                "exposed": use.exposed,
                "transfer": use.transfer,
                "bubble": use.bubble,
                "peak": use.peak,
                "passes": [
                    ["+".join(map(str, span.works)), span.start, span.end] for span in use.spans
                ],
            }
            for use in one.run.stages
        ],
    }
