"""Predicted memory as a table and as values for JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_dhellam.memory.prediction import RankMemory

_GIB = 2**30


def memory_table(found: Sequence[RankMemory], limit: int | None = None) -> str:
    """A row for each pipeline stage, whose ranks are alike; in GiB.

    Args:
        found: of each stage.
        limit: bytes that a rank may take, if it is known.
    """
    host = any(rank.host for rank in found)
    head = ["stage", "ranks", *found[0].parts, "total", *(["limit", ""] if limit else [])]
    head += ["host"] if host else []
    rows = [head]
    for rank in found:
        row = [str(rank.stage), str(rank.ranks), *map(_gib, rank.parts.values()), _gib(rank.total)]
        if limit:
            row += [_gib(limit), "fits" if rank.total <= limit else "does not fit"]
        rows.append([*row, _gib(rank.host)] if host else row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(("GiB on each rank, when it takes most", *(line.rstrip() for line in lines)))


def as_values(found: Sequence[RankMemory], limit: int | None = None) -> Mapping[str, Any]:
    """The same for JSON, in bytes."""
    stages = [
        {"stage": r.stage, "ranks": r.ranks, **r.parts}
        | {"total": r.total, "tensors": r.tensors, "host": r.host}
        for r in found
    ]
    return {"limit": limit, "stages": stages}


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f}"
