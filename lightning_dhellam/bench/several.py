"""`dhellam bench several`: every plan, and Megatron-core's own step, over real links between GPUs.

    a   Llama-3-70B width, sequence 8192, micro-batch 1
    b   Qwen3-14B width, sequence 8192, micro-batch 4

For each case, one after the other and each in processes of its own: Megatron-core trains its own
model with its own schedule, DDP and optimizer, in the environment that it asks for; ours trains the
same model from the same weights under a Trainer, searching on the way; and one process plays a rank
of the same group with links as fast as those that were measured, to show what emulation is worth.

`step ms` is forward, backward and the reduction of gradients, `whole ms` has the optimizer as well.
MFU counts attention causal-halved.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from lightning_dhellam.bench.cells import shapes
from lightning_dhellam.bench.megatron_model import has_transformer_engine
from lightning_dhellam.bench.report import Report, Row, pick_device
from lightning_dhellam.bench.several_job import MEGATRON, OURS, Job
from lightning_dhellam.bench.several_rank import JOB, RESULT
from lightning_dhellam.bench.workers import Budget, stop
from lightning_dhellam.models import training_flops_per_token

DESCRIPTION = "plans and Megatron-core's own step over real links of several GPUs, and emulated"

COLUMNS = (
    "case", "side", "plan", "step ms", "spread ms", "over megatron-core", "MFU", "whole ms",
    "whole MFU", "predicted ms", "error", "of real", "loss", "grad norm", "peak GiB",
)  # fmt: skip
_LATENCY = 10e-6
_APEX = Path(__file__).with_name("apex")
"""Has the GEMM that Megatron-core wants of Apex."""
_EMULATED = "emulated"
_SAME = {"loss": 1e-3, "grad norm": 2e-2}
"""How far apart, of its value, the two sides may be in bf16."""
_FILE = "ours"
"""What an emulated rank calls the plan that ours has installed."""


def add_options(parser: ArgumentParser) -> None:
    """What to measure."""
    parser.add_argument(
        "--cases", type=list[str], default=["a:8:2:1", "b:40:2:1", "a:8:1:2"],
        help="shape:layers:tensor:pipeline; layers that do not fit are left out",
    )  # fmt: skip
    parser.add_argument("--sides", type=list[str], default=[MEGATRON, OURS, _EMULATED])
    parser.add_argument("--micro_batches", type=int, default=4, help="of a step")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=2, help="steps of each plan that count")
    parser.add_argument("--steps", type=int, default=3, help="whole steps that are timed")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="of a device")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal")
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for one job")


def run(options: Namespace) -> Report:
    """Measure the cases, as far as the budget goes."""
    pick_device(options.device)
    budget = Budget(options.budget)
    unknown = sorted(set(options.sides) - {MEGATRON, OURS, _EMULATED})
    if unknown:
        raise ValueError(
            f"--sides: '{unknown[0]}' is not a side: use {MEGATRON}, {OURS}, {_EMULATED}"
        )
    report = Report("several", options.device, COLUMNS)
    folder = Path(options.output)
    for job in [parse(case, options) for case in options.cases]:
        for side, result in _sides(job, options, folder, budget):
            if "device" in result:
                report.device = f"{job.processes} {result.pop('device')}"
            report.rows += _rows(job, side, result, options.peak_tflops)
            _compare([row for row in report.rows if row["case"] == job.case])
            report.save(folder)
            print(f"{job.case} {side}: done, {budget.left:.0f} s left", flush=True)
    return report


def parse(case: str, options: Namespace) -> Job:
    """The job of a case.

    Raises:
        ValueError: it is written otherwise.
    """
    shape, *numbers = case.split(":")
    known = shapes(rehearse=options.device == "cpu")
    if shape not in known or len(numbers) != 3 or not all(n.isdigit() and int(n) for n in numbers):
        raise ValueError(
            f"--cases: '{case}' is not shape:layers:tensor:pipeline with a shape of"
            f" {', '.join(known)}, such as a:8:2:1"
        )
    layers, tensor, pipeline = map(int, numbers)
    return Job(
        MEGATRON, shape, layers, options.vocabulary, options.micro_batches, tensor, pipeline,
        options.device, options.rounds, options.steps,
    )  # fmt: skip


def _sides(
    job: Job, options: Namespace, folder: Path, budget: Budget
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The results of one side after the other; the emulated one needs what ours has found."""
    real: dict[str, Any] = {}
    home = folder / "several" / job.case.replace(" ", "-")
    if MEGATRON in options.sides:
        yield MEGATRON, _megatron(job, home / MEGATRON, options, budget)
    if OURS in options.sides:
        real = _done(replace(job, side=OURS), home / OURS, options, budget)
        yield OURS, dict(real)
    # One process cannot play a stage, which computes what another one sends.
    if _EMULATED in options.sides and real.get("link") and job.pipeline == 1:
        link = real["link"]
        bandwidth = link["bytes"] / max(link["seconds"] - _LATENCY, 1e-9)
        rank = replace(
            job,
            side=OURS,
            plan=str(home / OURS / "plan.json"),
            emulate={"bandwidth": bandwidth, "latency": _LATENCY, "sms": link["sms"]},
        )
        yield _EMULATED, _done(rank, home / _EMULATED, options, budget)


def _megatron(job: Job, folder: Path, options: Namespace, budget: Budget) -> dict[str, Any]:
    """Megatron-core with transformer-engine where that works, or else without."""
    if job.device == "cuda" and has_transformer_engine():
        engine = replace(job, transformer_engine=True)
        found = _done(engine, folder / "transformer-engine", options, budget)
        if "failed" not in found:
            return found
        print(f"{job.case} with transformer-engine: {found['failed']}", flush=True)
    return _done(job, folder, options, budget)


def _done(job: Job, folder: Path, options: Namespace, budget: Budget) -> dict[str, Any]:
    """The result of a job, or `failed` with the reason."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).unlink(missing_ok=True)
    job.save(folder / JOB)
    seconds = min(options.limit, budget.left)
    if seconds < 15:
        return {"failed": f"not begun: {seconds:.0f} s are left of the budget"}
    torchrun = [
        "lightning_dhellam.bench.torchrun",
        "--standalone",
        f"--nproc-per-node={job.processes}",
        "-m",
    ]
    module = [*(torchrun if job.processes > 1 else []), "lightning_dhellam.bench.several_rank"]
    environment = dict(os.environ)
    if job.side == MEGATRON:
        # What its overlap relies on, as its documentation says.
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
        paths = [str(_APEX), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", *module, str(folder)],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return {"failed": f"stopped after {seconds:.0f} s"}
        finally:
            stop(process)
    if code or not (folder / RESULT).exists():
        return {"failed": f"ended with code {code}: see {folder / 'log.txt'}"}
    found: dict[str, Any] = json.loads((folder / RESULT).read_text())
    return found


def _rows(job: Job, side: str, result: dict[str, Any], peak_tflops: float) -> list[Row]:
    """A row for each plan; of Megatron-core one."""
    case: Row = {"case": job.case, "side": side}
    if "failed" in result:
        return [case | result]
    config = replace(job.config(1e18), num_layers=result["layers"])
    tokens = job.micro_batches * job.micro_batch * job.length
    work = training_flops_per_token(config, job.length) * tokens
    full = peak_tflops * 1e12 * job.tensor * job.pipeline
    common = ("loss", "grad norm", "peak GiB", "layers")
    shared = case | {name: result[name] for name in common if side != _EMULATED or name == "layers"}
    whole = {"whole ms": result["step s"] * 1e3, "whole MFU": work / result["step s"] / full}
    plans = result.pop("plans", [{"plan": "-", "seconds": result.get("seconds")}])
    rows = []
    for plan in plans:
        name = _FILE if plan["plan"].endswith(".json") else plan["plan"]
        row: Row = shared | {"plan": name, "step ms": plan["seconds"] * 1e3}
        row["MFU"] = work / plan["seconds"] / full
        if "spread" in plan:
            row["spread ms"] = plan["spread"] * 1e3
        if "predicted" in plan:
            row["predicted ms"] = plan["predicted"] * 1e3
            row["error"] = plan["predicted"] / plan["seconds"] - 1
        if plan["plan"] == result.get("winner", "-"):
            row |= whole | {"details": result | ({"winner": name} if "winner" in result else {})}
        rows.append(row)
    return rows


def _compare(rows: list[Row]) -> None:
    """Of one case: over Megatron-core, if it trains the same, and emulated over real."""
    timed: dict[str, list[Row]] = {side: [] for side in (MEGATRON, OURS, _EMULATED)}
    for row in rows:
        if "step ms" in row:
            timed[row["side"]].append(row)
    ours = timed[OURS]
    if timed[MEGATRON] and ours:
        (theirs,) = timed[MEGATRON]
        if difference := _difference(theirs, ours[0]):
            theirs["failed"] = f"it trains something else, so nothing is compared: {difference}"
        else:
            for row in ours:
                row["over megatron-core"] = theirs["step ms"] / row["step ms"]
    real = {row["plan"]: row for row in ours}
    real.update((_FILE, row) for row in ours if "details" in row)
    for row in timed[_EMULATED]:
        if row["plan"] in real:
            row["of real"] = row["step ms"] / real[row["plan"]]["step ms"]


def _difference(theirs: Row, ours: Row) -> str:
    """What tells that the two sides do not train the same; nothing if they do."""
    wrong = [
        f"{name} {theirs[name]:.6g}, ours {ours[name]:.6g}"
        for name, tolerance in _SAME.items()
        if not abs(theirs[name] - ours[name]) <= tolerance * abs(ours[name])
    ]
    return "; ".join(wrong)
