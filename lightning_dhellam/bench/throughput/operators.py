"""Where the time of a training step goes: each operator's share, beside its nominal cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lightning_dhellam.engine import Engine


def operator_times(
    engine: Engine, train: Callable[[], Any], tokens: int, device: torch.device
) -> list[dict[str, Any]]:
    """The time of every kind of operator in one step, a row each, the longest first.

    Call it after real steps: whatever compiles on first use would count.

    Args:
        engine: The engine that runs the step.
        train: Makes it run one.
        tokens: Tokens of each micro-batch, which nominal costs are multiplied by.
        device: The device that the engine computes on.
    """
    with engine.traced(device) as tracer:
        train()
    total: dict[str, dict[str, Any]] = {}
    spans = tracer.spans()
    for span in spans:
        label = f"{span.strand}/{span.operator.name}"
        row = total.setdefault(label, {"operator": label, "calls": 0, "ms": 0.0, "nominal ms": 0.0})
        row["calls"] += 1
        row["ms"] += (span.end - span.start) * 1e3
        # What reads nothing runs once a step, and its cost is that of all tokens.
        row["nominal ms"] += span.operator.cost * (tokens if span.operator.reads else 1) * 1e3
    step = 1e3 * (max(span.end for span in spans) - min(span.start for span in spans))
    rows = sorted(total.values(), key=lambda row: -row["ms"])
    busy = sum(row["ms"] for row in rows)
    rows.append({
        "operator": "between operators", "calls": len(spans), "ms": step - busy, "nominal ms": 0.0,
    })  # fmt: skip
    return [{**row, "share": f"{row['ms'] / step:.1%}"} for row in rows]
