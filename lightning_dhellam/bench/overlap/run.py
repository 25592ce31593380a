"""Measures cell after cell on a rank of an emulated cluster, as far as the budget goes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from lightning_dhellam.bench.overlap.cells import Cell
from lightning_dhellam.bench.overlap.rank import Rank
from lightning_dhellam.bench.overlap.report import (
    COLUMNS,
    fp8_notes,
    lever_notes,
    limit_notes,
    notes_of,
    recompute_notes,
)
from lightning_dhellam.bench.overlap.settings import Settings
from lightning_dhellam.bench.report import Report, device_name, pick_device
from lightning_dhellam.bench.shapes import SLOWER, Shape, rank_of, shapes
from lightning_dhellam.kernels.deterministic import prepare
from lightning_dhellam.parallel import Cluster

_PICTURED = ("a4 copy:110", "a4 16sm:200", "b4 copy:calibrated", "b4 16sm:calibrated")


def measure(settings: Settings, folder: Path) -> Report:
    """Measure every cell that the budget allows, the most important first."""
    device = pick_device(settings.device)
    todo, known = settings.chosen_cells(), shapes(settings.rehearses)
    prepare()
    report = Report("overlap", device_name(device), COLUMNS, notes_of(settings, todo))
    slower = SLOWER if settings.rehearses else 1
    clock = _Clock(settings.budget)
    skipped: list[str] = []
    for sizes, cells in groupby(todo, lambda cell: _sizes(known[cell.shape])):
        group = list(cells)
        tensor, context_ranks, expert_ranks = sizes
        cluster = _cluster(group[0], known[group[0].shape])
        with rank_of(cluster, tensor, device, context_ranks, expert_ranks) as context:
            rank = Rank(context, known, settings, slower)
            skipped += _measure(group, rank, report, clock, folder)
    report.notes |= lever_notes(todo, report.rows) | recompute_notes(todo, report.rows)
    report.notes |= limit_notes(todo, report.rows) | fp8_notes(todo, report.rows)
    if skipped:
        report.notes["not measured, for lack of time"] = ", ".join(skipped)
    report.save(folder)
    return report


def _sizes(shape: Shape) -> tuple[int, int, int]:
    """How many ranks share layers, sequences and experts."""
    return shape.ranks, shape.context_ranks, shape.expert_ranks


def _cluster(cell: Cell, shape: Shape) -> Cluster:
    links = {cell.lane.value: cell.link}
    if cell.context_link is not None:
        links["cp"] = cell.context_link
    return Cluster(world_size=shape.world_size, links=links)


@dataclass
class _Clock:
    """How much of the time is left.

    Attributes:
        budget: Seconds after which no more cells are begun.
        longest: Seconds that a cell took at most.
    """

    budget: float
    longest: float = 0.0
    begin: float = field(default_factory=time.perf_counter)

    @property
    def allows(self) -> bool:
        """Whether another cell would be done in time."""
        return time.perf_counter() - self.begin + self.longest <= self.budget

    @contextmanager
    def cell(self) -> Iterator[None]:
        """Note how long the body takes."""
        started = time.perf_counter()
        yield
        self.longest = max(self.longest, time.perf_counter() - started)


def _measure(
    todo: Sequence[Cell], rank: Rank, report: Report, clock: _Clock, folder: Path
) -> list[str]:
    """Measure one cell after the other. One that fails is noted, and the others go on.

    Returns the cells for which there was no time.
    """
    skipped = []
    for cell in todo:
        if not clock.allows:
            skipped.append(cell.name)
            continue
        with clock.cell():
            _measure_cell(cell, rank, report, folder)
        report.save(folder)
    return skipped


def _measure_cell(cell: Cell, rank: Rank, report: Report, folder: Path) -> None:
    try:
        measured = rank.measure(cell)
    except Exception as error:
        report.notes[f"FAILED {cell.name}"] = f"{type(error).__name__}: {error}"
        print(f"{cell.name} FAILED: {error}", flush=True)
        rank.recover()
        return
    report.rows += measured.rows
    report.notes[cell.name] = measured.note
    notes = {"conditions": measured.note}
    print(Report(cell.name, report.device, COLUMNS, notes, measured.rows).table(), flush=True)
    if cell.name in _PICTURED:
        measured.views.draw(folder / f"overlap-{cell.file_name}.png")
