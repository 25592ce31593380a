"""Trains the cases of `dhellam bench memory`, one after the other, and looks at what they take."""

from __future__ import annotations

import gc
import time
from pathlib import Path

import torch

from lightning_dhellam.bench.memory.cases import Case
from lightning_dhellam.bench.memory.report import COLUMNS, row_of
from lightning_dhellam.bench.memory.settings import Settings
from lightning_dhellam.bench.memory.trained import Trained, room_of
from lightning_dhellam.bench.processes import Budget
from lightning_dhellam.bench.report import Report, Row, device_name, pick_device
from lightning_dhellam.bench.shapes import rank_of
from lightning_dhellam.kernels.deterministic import prepare
from lightning_dhellam.memory.prediction import predict_rank


def measure(settings: Settings, folder: Path) -> Report:
    """Measure every case that the budget allows. One that fails costs its own row."""
    device = pick_device(settings.device)
    prepare()
    budget = Budget(settings.budget)
    report = Report("memory", device_name(device), COLUMNS)
    report.notes["EMULATED"] = "ranks of several: what they hold means something, losses do not"
    for name, case in settings.chosen_cases().items():
        if not budget.left:
            report.rows.append({"case": name, "failed": "not begun: the budget is spent"})
            continue
        row: Row = {"case": name}
        report.rows.append(row)
        begin = time.perf_counter()
        try:
            _fill(row, case, settings, device)
        except Exception as error:
            row["failed"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        row["s"] = time.perf_counter() - begin
        _free(device)
        print({column: row[column] for column in ("failed", *COLUMNS) if column in row}, flush=True)
        report.save(folder)
    return report


def _fill(row: Row, case: Case, settings: Settings, device: torch.device) -> None:
    """Train a case, and put into its row what was predicted and what was measured."""
    room, topology = room_of(case), case.topology
    left = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    with rank_of(
        case.cluster,
        topology.tp_size,
        device,
        topology.cp_size,
        topology.ep_size,
        topology.pp_size,
    ) as context:
        trained = Trained(case, context, room)
        try:
            losses, taken = trained.steps(settings.steps, left)
            again = trained.recompute
            row |= row_of(predict_rank(case.run(again), topology.rank), taken)
            row["recompute"] = again if isinstance(again, str) else "by layer"
            row |= {"made again": again, "losses": losses}
            if case.means_something:
                row["loss"] = losses[-1]
                if settings.parity:
                    row["parity"] = trained.parity()
        finally:
            trained.close()


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
