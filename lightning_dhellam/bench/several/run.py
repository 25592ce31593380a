"""Runs one side of one case after the other, each in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_dhellam.bench.megatron_model import has_transformer_engine
from lightning_dhellam.bench.processes import Budget, stop
from lightning_dhellam.bench.report import Report, pick_device
from lightning_dhellam.bench.several.job import (
    EMULATED,
    JOB,
    MEGATRON,
    OURS,
    RESULT,
    SCHEDULED,
    Job,
)
from lightning_dhellam.bench.several.report import COLUMNS, compare, rows_of
from lightning_dhellam.bench.several.settings import Settings

_PROCESS = "lightning_dhellam.bench.several.process"
_TORCHRUN = "lightning_dhellam.bench.torchrun"
_APEX = Path(__file__).with_name("apex")
"""Has the GEMM that Megatron-core wants of Apex: without it, it would be slower than its users."""
_LATENCY = 10e-6
_SHORTEST = 15
"""Seconds below which a job is not begun, because it would get nowhere."""


def measure(settings: Settings, folder: Path) -> Report:
    """Measure the cases, as far as the budget goes."""
    pick_device(settings.device)
    budget = Budget(settings.budget)
    report = Report("several", settings.device, COLUMNS)
    for job in settings.jobs():
        for side, result in _sides(job, settings, folder, budget):
            if "device" in result:
                report.device = f"{job.processes} {result.pop('device')}"
            for row in result.pop("measured", [result]):
                report.rows += rows_of(job, side, row, settings.peak_tflops)
            compare([row for row in report.rows if row["case"] == job.case])
            report.save(folder)
            print(f"{job.case} {side}: done, {budget.left:.0f} s left", flush=True)
    return report


def _sides(
    job: Job, settings: Settings, folder: Path, budget: Budget
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The results of one side after the other; the emulated one needs what ours has found."""
    home = folder / "several" / job.case.replace(" ", "-")
    theirs = ("1",) * (MEGATRON in settings.sides) + settings.schedules(MEGATRON)
    if theirs:
        their = replace(job, schedules=theirs)
        yield MEGATRON, _megatron(their, home / MEGATRON, settings, budget)
    schedules = settings.schedules(OURS)
    if schedules:
        walked = replace(job, side=SCHEDULED, schedules=schedules, plan=settings.plan)
        yield OURS, _done(walked, home / SCHEDULED, settings, budget)
    for count in settings.counts if OURS in settings.sides else ():
        one = replace(job, side=OURS, counts=(count,))
        place = home if len(settings.counts) == 1 else home / str(count)
        yield from _searched(one, place, settings, budget)


def _searched(
    job: Job, home: Path, settings: Settings, budget: Budget
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The result of our search, and of the emulated rank."""
    found = _done(job, home / OURS, settings, budget)
    (real,) = found.get("measured") or [found]
    yield OURS, dict(found)
    # One process cannot play a stage, which computes what another one sends, and what was measured
    # is one link.
    alone = job.pipeline == job.context == job.experts == 1
    if EMULATED in settings.sides and real.get("link") and alone:
        link = real["link"]
        bandwidth = link["bytes"] / max(link["seconds"] - _LATENCY, 1e-9)
        rank = replace(
            job,
            side=OURS,
            plan=str(home / OURS / "plan.json"),
            emulate={"bandwidth": bandwidth, "latency": _LATENCY, "sms": link["sms"]},
        )
        yield EMULATED, _done(rank, home / EMULATED, settings, budget)


def _megatron(job: Job, folder: Path, settings: Settings, budget: Budget) -> dict[str, Any]:
    """Megatron-core with transformer-engine where that works, or else without.

    Experts are its modules that need none: each an MLP of its own.
    """
    if job.device == "cuda" and has_transformer_engine() and job.experts == 1:
        engine = replace(job, transformer_engine=True)
        found = _done(engine, folder / "transformer-engine", settings, budget)
        if "failed" not in found:
            return found
        print(f"{job.case} with transformer-engine: {found['failed']}", flush=True)
    return _done(job, folder, settings, budget)


def _done(job: Job, folder: Path, settings: Settings, budget: Budget) -> dict[str, Any]:
    """The result of a job, or `failed` with the reason."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).unlink(missing_ok=True)
    job.save(folder / JOB)
    seconds = min(settings.limit, budget.left)
    if seconds < _SHORTEST:
        return {"failed": f"not begun: {seconds:.0f} s are left of the budget"}
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", *_modules(job), str(folder)],
            env=_environment(job),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
            reason = f"ended with code {code}: see {folder / 'log.txt'}"
        except subprocess.TimeoutExpired:
            reason = f"stopped after {seconds:.0f} s"
        finally:
            stop(process)
    if not (folder / RESULT).exists():
        return {"failed": reason}
    found: dict[str, Any] = json.loads((folder / RESULT).read_text())
    if not found.pop("whole"):
        if not found["measured"]:
            return {"failed": reason}
        found["measured"].append({"failed": reason})
    return found


def _modules(job: Job) -> list[str]:
    """What Python runs for a job: its process, or torchrun that starts several of them."""
    if job.processes == 1:
        return [_PROCESS]
    return [_TORCHRUN, "--standalone", f"--nproc-per-node={job.processes}", "-m", _PROCESS]


def _environment(job: Job) -> dict[str, str]:
    """The environment of a job: for Megatron-core what it asks for."""
    environment = dict(os.environ)
    if job.side == MEGATRON:
        # What its overlap relies on, as its documentation says.
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
        paths = [str(_APEX), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment
