"""Runs one side of one case after the other, each in processes of its own.

Those of the next one start and import while one trains, and wait for their turn. What a side has
measured so far is in the report after each of its rows.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lightning_dhellam.bench.megatron_model import has_transformer_engine
from lightning_dhellam.bench.processes import Budget, stop
from lightning_dhellam.bench.report import Report, pick_device
from lightning_dhellam.bench.several import starting
from lightning_dhellam.bench.several.job import (
    EMULATED,
    JOB,
    LOG,
    MEGATRON,
    OURS,
    PLAN,
    RESULT,
    TP_OVERLAP,
    Job,
)
from lightning_dhellam.bench.several.report import COLUMNS, compare, row_of
from lightning_dhellam.bench.several.settings import Settings

_LATENCY = 10e-6
_SHORTEST = 15
"""Seconds below which a job is not begun, because it would get nowhere."""
_LOOK = 0.5
"""Seconds between two looks for what a job has measured."""
Result = dict[str, Any]


@dataclass(frozen=True)
class Turn:
    """A side of a case whose turn comes.

    Attributes:
        side: Who trains, in the table.
        job: What its processes are told.
        folder: Where they are told it, and write.
    """

    side: str
    job: Job
    folder: Path


def measure(settings: Settings, folder: Path) -> Report:
    """Measure the cases, as far as the budget goes."""
    pick_device(settings.device)
    budget = Budget(settings.budget)
    report = Report("several", settings.device, COLUMNS)
    turns = [turn for job in settings.jobs() for turn in _turns(job, settings, folder)]
    with ExitStack() as stack:
        ahead = _started(stack, turns[0])
        for turn, following in zip(turns, [*turns[1:], None], strict=True):
            process, done = ahead, list(report.rows)
            if following is not None:
                ahead = _started(stack, following)

            def seen(result: Result, turn: Turn = turn, done: list[dict[str, Any]] = done) -> None:
                _report(report, turn, result, done, settings)
                report.save(folder)

            due = turn.job if turn.side != EMULATED else _emulating(turn, report)
            if due is None:
                stop(process)
                continue
            turn = replace(turn, job=due)
            begun, left = budget.left, min(settings.limit, budget.left)
            result = _result(process, turn, left, seen)
            if "failed" in result and turn.job.transformer_engine and not turn.job.tp_overlap:
                print(f"{turn.job.case} with transformer-engine: {result['failed']}", flush=True)
                plain = replace(turn.job, transformer_engine=False)
                turn = replace(turn, job=plain, folder=turn.folder.parent)
                left = min(settings.limit, budget.left)
                result = _result(_started(stack, turn), turn, left, seen)
            seen(result)
            taken = f"{begun - budget.left:.0f} s, {budget.left:.0f} s left"
            print(f"{turn.job.case} {turn.side}: done in {taken}", flush=True)
    return report


def _turns(job: Job, settings: Settings, folder: Path) -> Iterator[Turn]:
    """The sides of a case, in their order."""
    home = folder / "several" / job.case.replace(" ", "-")
    theirs = ("1",) * (MEGATRON in settings.sides) + settings.schedules(MEGATRON)
    # Experts are modules that need no transformer-engine: each an MLP of its own.
    engine = job.device == "cuda" and not job.sparse and has_transformer_engine()
    if theirs:
        their = replace(job, schedules=theirs, transformer_engine=engine)
        yield Turn(MEGATRON, their, home / MEGATRON / ("transformer-engine" if engine else ""))
    if settings.overlaps:
        their = replace(job, transformer_engine=True, tp_overlap=True)
        yield Turn(f"{MEGATRON}:{TP_OVERLAP}", their, home / MEGATRON / TP_OVERLAP)
    schedules = settings.schedules(OURS)
    plans = settings.plans if OURS in settings.sides else ()
    if schedules or plans:
        yield Turn(OURS, replace(job, side=OURS, schedules=schedules, plans=plans), home / OURS)
    # One process cannot play a stage, which computes what another one sends, and what was measured
    # is one link.
    if plans and EMULATED in settings.sides and job.ranks == job.tensor:
        given = (*dict.fromkeys(plans), str(home / OURS / PLAN))
        rank = replace(job, side=OURS, plans=given, counts=job.counts[:1], emulate={"sms": 0})
        yield Turn(EMULATED, rank, home / EMULATED)


def _emulating(turn: Turn, report: Report) -> Job | None:
    """The job of a rank with links as fast as ours has measured; None if it has measured none."""
    rows = (row for row in report.rows if row["case"] == turn.job.case and row["side"] == OURS)
    links = [row["details"]["link"] for row in rows if row.get("details", {}).get("link")]
    if not links:
        return None
    (link, *_) = links
    bandwidth = link["bytes"] / max(link["seconds"] - _LATENCY, 1e-9)
    played = {"bandwidth": bandwidth, "latency": _LATENCY, "sms": link["sms"]}
    return replace(turn.job, emulate=played)


def _report(
    report: Report, turn: Turn, result: Result, done: list[dict[str, Any]], settings: Settings
) -> None:
    """Put the rows of a side, as far as there are any, behind those that were done before it."""
    if "device" in result:
        report.device = f"{turn.job.ranks} {result['device']}"
    rows = result.get("measured", [result])
    mine = [row_of(turn.job, turn.side, row, settings.peak_tflops) for row in rows]
    report.rows = [*done, *mine]
    compare([row for row in report.rows if row["case"] == turn.job.case])


def _started(stack: ExitStack, turn: Turn) -> subprocess.Popen[Any]:
    """The processes of a turn, which wait for their job."""
    turn.folder.mkdir(parents=True, exist_ok=True)
    for name in (JOB, RESULT):
        (turn.folder / name).unlink(missing_ok=True)
    process = starting.start(turn.job, turn.folder)
    stack.callback(stop, process)
    return process


def _result(
    process: subprocess.Popen[Any],
    turn: Turn,
    seconds: float,
    seen: Callable[[Result], None],
) -> Result:
    """The result of a job, or `failed` with the reason; `seen` is called with what is there yet."""
    if seconds < _SHORTEST:
        stop(process)
        return {"failed": f"not begun: {seconds:.0f} s are left of the budget"}
    turn.job.save(turn.folder / JOB)
    limit, known = Budget(seconds), 0
    while process.poll() is None and limit.left:
        with suppress(subprocess.TimeoutExpired):
            process.wait(min(_LOOK, limit.left))
        found = _found(turn.folder)
        if len(found["measured"]) > known:
            known = len(found["measured"])
            seen(found)
    code = process.poll()
    reason = f"ended with code {code}: see {turn.folder / LOG}"
    if code is None:
        reason = f"stopped after {seconds:.0f} s"
    stop(process)
    found = _found(turn.folder)
    if not found["measured"]:
        return {"failed": reason}
    if not found["whole"]:
        there = [(row["micro-batches"], row["row"]) for row in found["measured"]]
        missing = [row for row in turn.job.rows if row not in there]
        names = ", ".join(f"{name} of {count} micro-batches" for count, name in missing)
        found["measured"].append({"failed": f"{reason}; not measured: {names or 'nothing'}"})
    return found


def _found(folder: Path) -> Result:
    """What the processes have measured so far."""
    if not (folder / RESULT).exists():
        return {"whole": False, "measured": []}
    found: Result = json.loads((folder / RESULT).read_text())
    return found
