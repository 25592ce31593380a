"""Runs every side in the same processes, one for each stage of the pipeline."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from lightning_dhellam.bench.pipeline.report import COLUMNS, Measured, rows_of
from lightning_dhellam.bench.pipeline.settings import Settings
from lightning_dhellam.bench.pipeline.sides import measure_sides
from lightning_dhellam.bench.report import Report, device_name


def measure(settings: Settings, folder: Path) -> Report:
    """Measure every side."""
    notes = {
        "preset": settings.preset,
        "layers": settings.layers,
        "sequence": settings.sequence,
    }
    report = Report("pipeline", device_name(torch.device("cpu")), COLUMNS, notes)
    report.rows += rows_of(settings, _measured(settings))
    return report


def _measured(settings: Settings) -> dict[str, Measured]:
    """What the first stage saw of each side."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.json"
        mp.spawn(_process, (settings, store.port, path), nprocs=settings.stages)
        return {name: Measured(**side) for name, side in json.loads(path.read_text()).items()}


def _process(rank: int, settings: Settings, port: int, path: Path) -> None:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=settings.stages)
    found = measure_sides(settings)
    if rank == 0:
        path.write_text(json.dumps({name: asdict(side) for name, side in found.items()}))
    dist.barrier()
    dist.destroy_process_group()
