"""Measures cell after cell on a rank of an emulated cluster, as far as the budget goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from lightning_dhellam.bench.overlap.cells import Cell
from lightning_dhellam.bench.overlap.rank import Rank
from lightning_dhellam.bench.overlap.report import COLUMNS, lever_notes, notes_of
from lightning_dhellam.bench.overlap.settings import Settings
from lightning_dhellam.bench.report import Report, device_name, pick_device
from lightning_dhellam.bench.shapes import SLOWER, rank_of, shapes
from lightning_dhellam.kernels.deterministic import prepare
from lightning_dhellam.parallel import Cluster

_PICTURED = ("a4 copy:110", "a4 16sm:200", "b4 copy:calibrated", "b4 16sm:calibrated")


def measure(settings: Settings, folder: Path) -> Report:
    """Measure every cell that the budget allows, the most important first."""
    device = pick_device(settings.device)
    links, todo = settings.played_links(), settings.chosen_cells()
    prepare()
    report = Report("overlap", device_name(device), COLUMNS, notes_of(settings, todo))
    with rank_of(Cluster(world_size=8, links={"tp": links[0]}), 8, device) as context:
        slower = SLOWER if settings.rehearses else 1
        rank = Rank(context, shapes(settings.rehearses), settings, slower)
        _measure(todo, rank, report, settings.budget, folder)
    return report


def _measure(todo: Sequence[Cell], rank: Rank, report: Report, budget: float, folder: Path) -> None:
    """Measure one cell after the other. One that fails is noted, and the others go on."""
    begin = time.perf_counter()
    longest = 0.0
    skipped = []
    for cell in todo:
        started = time.perf_counter()
        if started - begin + longest > budget:
            skipped.append(cell.name)
            continue
        _measure_cell(cell, rank, report, folder)
        longest = max(longest, time.perf_counter() - started)
        report.save(folder)
    report.notes |= lever_notes(todo, report.rows)
    if skipped:
        report.notes["not measured, for lack of time"] = ", ".join(skipped)
    report.save(folder)


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
