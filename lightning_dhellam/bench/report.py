"""One table per benchmark: printed, and written as JSON with where and when it was measured."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from lightning_dhellam.search.files import save_text

_PACKAGES = ("torch", "triton", "lightning", "megatron-core", "transformers", "liger-kernel")

Row = dict[str, Any]


@dataclass
class Report:
    """Rows of one benchmark.

    Attributes:
        name: of the benchmark.
        columns: keys of the rows, in the order of the table.
        notes: lines above the table, and values that belong to no row.
        rows: one for each thing measured.
    """

    name: str
    columns: Sequence[str]
    notes: Row = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def table(self) -> str:
        """The notes and the rows as text."""
        cells = [[_shown(row.get(column)) for column in self.columns] for row in self.rows]
        lines = [list(self.columns), *cells]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        notes = [f"{name}: {_shown(value)}" for name, value in self.notes.items()]
        table = ["  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) for r in lines]
        return "\n".join([self.name, *notes, *table])

    def save(self, folder: Path) -> Path:
        """Write `<name>-<device>-<date>.json` into `folder`, whole or not at all."""
        now = datetime.now(UTC)
        folder.mkdir(parents=True, exist_ok=True)
        device = device_name().lower().replace(" ", "-")
        path = folder / f"{self.name}-{device}-{now:%Y-%m-%d}.json"
        content = {
            "benchmark": self.name,
            "device": device_name(),
            "date": now.isoformat(timespec="seconds"),
            "versions": _versions(),
            **self.notes,
            "rows": self.rows,
        }
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(content, indent=1) + "\n")
        aside.replace(path)
        return path

    def save_with_table(self, folder: Path) -> Path:
        """The same, and the table as text beside it."""
        path = self.save(folder)
        save_text(path.with_suffix(".txt"), f"{self.table()}\n")
        return path


def device_name() -> str:
    """What everything is measured on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU {platform.machine()}"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)
