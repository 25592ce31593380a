"""Processes of this host that save and load in turn, each way as often."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from lightning_dhellam.bench.checkpoint.report import COLUMNS, rows_of
from lightning_dhellam.bench.checkpoint.settings import BANDWIDTH, STEPS, Settings
from lightning_dhellam.bench.checkpoint.sides import SIDES, Parts, Side, parts_of
from lightning_dhellam.bench.checkpoint.steps import measure_steps
from lightning_dhellam.bench.processes import end_with_parent
from lightning_dhellam.bench.report import Report, Row, device_name, pick_device
from lightning_dhellam.checkpoint.checksums import crc32
from lightning_dhellam.runner import Runner

_CPU = torch.device("cpu")
Times = dict[str, dict[str, float]]
"""By way, and by `save` and `load`: seconds."""


def measure(settings: Settings, folder: Path) -> Report:
    """Save and load in `folder`, whose file system is measured, and leave only the report there."""
    device = pick_device(settings.device) if STEPS in settings.parts else _CPU
    report = Report("checkpoint", device_name(_CPU), COLUMNS)
    report.notes["checksums"] = f"by {crc32.__module__}"
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".checkpoints-") as place:
        if BANDWIDTH in settings.parts:
            size, times = _of_processes(settings, Path(place))
            report.notes["state"] = f"{size / 1e9:.3g} GB of {settings.processes} processes"
            report.rows += rows_of(times, size)
            report.save(folder)
        if STEPS in settings.parts:
            rows = report.details["steps"] = []
            report.device = device_name(device)

            def tell(row: Row) -> None:
                print(row, flush=True)
                rows.append(row)
                report.save(folder)

            measure_steps(settings, Path(place), device, tell)
    return report


def _of_processes(settings: Settings, place: Path) -> tuple[int, Times]:
    """Bytes of all that is saved, and what the first process has measured."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # which takes seconds, once for all of them
    receiver, sender = context.Pipe(duplex=False)
    processes = [
        context.Process(target=_process, args=(rank, settings, place, sender), daemon=True)
        for rank in range(settings.processes)
    ]
    try:
        for process in processes:
            process.start()
        sender.close()
        try:
            found = receiver.recv()
        except EOFError:
            raise RuntimeError("a process of the benchmark has failed: see above") from None
        for process in processes:
            process.join()
        return found[0], found[1]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()


def _process(rank: int, settings: Settings, place: Path, sender: Connection) -> None:
    end_with_parent()
    torch.set_num_threads(1)
    if os.path.exists("/sys/class/net/lo"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = dist.FileStore(str(place / "store"), settings.processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=settings.processes)
    found = _measured(settings, place)
    if rank == 0:
        sender.send(found)
    dist.barrier()
    dist.destroy_process_group()


def _measured(settings: Settings, place: Path) -> tuple[int, Times]:
    sizes: dict[str, Any] = {
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
    }
    with Runner.create(settings.config, "cpu", micro_batch_size=1, **sizes) as runner:
        optimizer = runner.optimizer(torch.optim.AdamW(runner.model.parameters()))
        tokens = torch.arange(17)[None] % settings.vocabulary
        runner.train({"tokens": tokens[:, :-1], "labels": tokens[:, 1:]})
        optimizer.step()  # from now on there are moments
        size = torch.tensor(sum(part.nbytes for part in parts_of(runner, optimizer).values()))
        dist.all_reduce(size)
        sides: dict[str, Side] = {name: make(runner, optimizer) for name, make in SIDES.items()}
        taken: dict[str, dict[str, list[float]]] = {n: {"save": [], "load": []} for n in sides}
        for number in range(settings.repeats + 1):
            for name, side in sides.items():
                path = place / f"{name.replace(' ', '-')}-{number}"
                saving, loading = partial(side.save, path), partial(side.load, path)
                if number:
                    taken[name]["save"].append(_seconds(saving))
                    taken[name]["load"].append(_seconds(loading))
                else:  # which fills caches of files and of code
                    saving()
                    _check(name, parts_of(runner, optimizer), loading)
                dist.barrier()
                if dist.get_rank() == 0:
                    shutil.rmtree(path)
    times = {name: {k: median(v) for k, v in both.items()} for name, both in taken.items()}
    return int(size), times


def _seconds(work: Callable[[], Any]) -> float:
    """Seconds until all ranks have done it."""
    dist.barrier()
    begin = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - begin


def _check(name: str, parts: Parts, loading: Callable[[], Callable[[], Parts]]) -> None:
    """Refuse to time a way that does not read what it has written."""
    wanted = {part: tensor.clone() for part, tensor in parts.items()}
    for tensor in parts.values():
        tensor.zero_()
    found = loading()()
    wrong = [part for part, tensor in wanted.items() if not torch.equal(found[part], tensor)]
    if wrong:
        raise RuntimeError(f"{name}: {wrong[0]} is not read as it was written")
    for part, tensor in parts.items():
        tensor.copy_(wanted[part])
