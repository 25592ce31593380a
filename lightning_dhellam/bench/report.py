"""One table per benchmark: printed, and written with where and when it was measured."""

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

from lightning_dhellam.files import save_text

_PACKAGES = (
    "torch", "triton", "lightning", "megatron-core", "transformers", "liger-kernel",
    "flash-attn", "flash-attn-4", "transformer-engine",
)  # fmt: skip

Row = dict[str, Any]


@dataclass
class Report:
    """The rows of one benchmark, and what is to be known about them.

    Attributes:
        name: The benchmark's name.
        device: The device that was measured.
        columns: Keys of the rows in the order of the table. A row may hold more, for the JSON.
        notes: Lines above the table, and values that belong to no row.
        rows: A row for each thing measured. One that failed has the reason under `failed`.
        details: More tables by name, of which each row is printed whole.
    """

    name: str
    device: str
    columns: Sequence[str]
    notes: Row = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    details: dict[str, list[Row]] = field(default_factory=dict)
    _saved: Path | None = None

    @property
    def failures(self) -> list[str]:
        """The reasons of the rows that failed, one line for each."""
        return [str(row["failed"]) for row in self.rows if "failed" in row]

    def table(self) -> str:
        """The notes and the rows as text."""
        notes = [f"{name}: {_shown(value)}" for name, value in self.notes.items()]
        lines = [f"{self.name} on {self.device}", *notes, *_aligned(self.columns, self.rows)]
        for title, rows in self.details.items():
            lines += ["", title, *_aligned(list(rows[0]) if rows else [], rows)]
        return "\n".join(lines)

    def save(self, folder: Path) -> Path:
        """Write `<name>-<device>-<date>.json` and `.txt` into `folder`. Returns the JSON's path.

        Each file is there whole or not at all, and saving again replaces it: reports are saved
        after every row, so that nothing measured is lost when a later row takes the process down.
        """
        now = datetime.now(UTC)
        device = self.device.lower().replace(" ", "-")
        path = Path(folder) / f"{self.name}-{device}-{now:%Y-%m-%d}.json"
        content = {
            "benchmark": self.name,
            "device": self.device,
            "date": now.isoformat(timespec="seconds"),
            "versions": _versions(),
            **self.notes,
            "rows": self.rows,
            **self.details,
        }
        if self._saved not in (None, path):  # the device was not known yet, or midnight passed
            self._remove()
        self._saved = path
        save_text(path, json.dumps(content, indent=1) + "\n")
        save_text(path.with_suffix(".txt"), f"{now:%Y-%m-%d} {self.table()}\n")
        return path

    def _remove(self) -> None:
        assert self._saved is not None
        for file in (self._saved, self._saved.with_suffix(".txt")):
            file.unlink(missing_ok=True)


def device_name(device: torch.device) -> str:
    """The name of `device` as its maker or the kernel has it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU {platform.machine()}"


def pick_device(name: str) -> torch.device:
    """The device that the option `--device` names.

    Raises:
        ValueError: The name is neither `cuda` nor `cpu`, or this machine has no such device.
    """
    if name not in ("cuda", "cpu"):
        raise ValueError(f"--device={name}: use cuda, or cpu for a rehearsal")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device=cuda: there is no CUDA device here; --device=cpu rehearses the benchmark"
        )
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


def _aligned(columns: Sequence[str], rows: Sequence[Row]) -> list[str]:
    """The rows under their columns; below them why some are missing values."""
    lines = [list(columns), *([_shown(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    table = ["  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) for r in lines]
    reasons = [
        f"row {number}: {row['failed']}" for number, row in enumerate(rows, 1) if "failed" in row
    ]
    return table + reasons


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
