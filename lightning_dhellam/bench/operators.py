"""Where the time of a training step goes: each operator's share, beside its nominal floor."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from lightning_dhellam.engine import Engine
from lightning_dhellam.engine.executor import Entry


def operator_times(
    engine: Engine, train: Callable[[], Any], tokens: int, device: torch.device
) -> list[dict[str, Any]]:
    """Time of every kind of operator in one step, the longest first.

    For an engine that has only its compute lane (no tensor parallelism): an operator lasts until
    the next begins, so gaps that the host leaves count too. Call it when everything is compiled.

    Args:
        engine: runs the step.
        train: makes it run one.
        tokens: of each micro-batch, which nominal costs are multiplied by.
        device: that it computes on.
    """
    seen: list[tuple[Entry, Any]] = []
    executor = engine._executor
    executor.observer = lambda entry, values: seen.append((entry, _now(device)))
    try:
        train()
        end = _now(device)
    finally:
        executor.observer = None
    moments = [moment for _, moment in seen[1:]] + [end]
    total: dict[str, dict[str, Any]] = {}
    for (entry, begin), until in zip(seen, moments, strict=True):
        empty = {"operator": entry.label, "calls": 0, "ms": 0.0, "nominal ms": 0.0}
        row = total.setdefault(entry.label, empty)
        row["calls"] += 1
        row["ms"] += _seconds(begin, until) * 1e3
        row["nominal ms"] += entry.operator.cost * tokens * 1e3
    whole = sum(row["ms"] for row in total.values())
    rows = sorted(total.values(), key=lambda row: -row["ms"])
    return [{**row, "share": f"{row['ms'] / whole:.1%}"} for row in rows]


def _now(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begin: Any, end: Any) -> float:
    if isinstance(begin, float):
        return float(end - begin)
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1000
