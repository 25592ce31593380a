"""A comparison of pipeline schedules as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_dhellam.files import save_text
from lightning_dhellam.search.pipeline import Compared, Comparison, StageUse
from lightning_dhellam.search.report.outcomes import time_text

FORMAT = 2
_GIB = 2**30


def comparison_table(comparison: Comparison) -> str:
    """Print a comparison: steps, what stages spend them on, and memory, as means and by stage."""
    rows = [_row(name, one, comparison) for name, one in comparison.compared.items()]
    head = ["schedule", "step", "speed", "compute", "exposed", "transfer", "bubble", "peak memory"]
    parts = [_aligned([head, *rows])]
    parts.append(_by_stage("bubble", comparison, lambda one, use: _percent(_bubble(one, use))))
    parts.append(_by_stage("peak memory", comparison, lambda one, use: _memory(one, use.peak)))
    parts.append("\nbest first: " + ", ".join(comparison.ranking))
    parts += [f"{name}: {one.reason}" for name, one in comparison.ranking.items() if one.reason]
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


def save_comparison(path: Path, comparison: Comparison, conditions: Mapping[str, Any]) -> None:
    """Write what the table shows, with every stage and every visit, as JSON."""
    fields = {
        "format": FORMAT,
        "conditions": conditions,
        "schedules": {name: _fields(one) for name, one in comparison.compared.items()},
        "ranking": {name: one.reason for name, one in comparison.ranking.items()},
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
                "visits": [
                    ["+".join(map(str, visit.works)), visit.start, visit.end]
                    for visit in use.intervals
                ],
            }
            for use in one.run.stages
        ],
    }
