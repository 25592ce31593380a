"""The table of `dhellam bench several`: of each case rows for Megatron-core, and for each plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning_dhellam.bench.report import Row
from lightning_dhellam.bench.several.job import EMULATED, MEGATRON, OURS, Job
from lightning_dhellam.models import training_flops_per_token

COLUMNS = (
    "case", "micro-batches", "side", "schedule", "plan", "step ms",
    "over megatron-core", "over tp-overlap", "over interleaved", "MFU", "whole ms", "whole MFU",
    "predicted ms", "error", "of real", "loss", "grad norm", "peak GiB", "of its peak",
)  # fmt: skip
_SAME = {"loss": 1e-3, "grad norm": 2e-2}
"""How far apart, of its value, the two sides may be in bf16."""
_FILE = "ours"
"""What an emulated rank calls the plan that was ours fastest."""


def row_of(job: Job, side: str, result: dict[str, Any], peak_tflops: float) -> Row:
    """The row of what was measured by one plan and schedule.

    Args:
        job: What was trained.
        side: Who trained it.
        result: What its processes have measured, or `failed` with the reason.
        peak_tflops: TFLOP/s that a device could compute at most.
    """
    row: Row = {"case": job.case, "side": side}
    if "failed" in result:
        return row | result
    row |= {name: result[name] for name in ("micro-batches", "schedule") if name in result}
    config = replace(job.config(1e18), num_layers=result["layers"])
    tokens = result["micro-batches"] * job.micro_batch * job.samples * job.length
    work = training_flops_per_token(config, job.length) * tokens
    full = peak_tflops * 1e12 * job.ranks
    common = ("loss", "grad norm", "peak GiB", "layers")
    row |= {name: result[name] for name in common if side != EMULATED or name == "layers"}
    plan, seconds = result.get("plan", "-"), result["seconds"]
    row |= {"plan": _FILE if plan.endswith(".json") else plan, "step ms": seconds * 1e3}
    row["MFU"] = work / seconds / full
    if result.get("predicted") is not None:
        row["predicted ms"] = result["predicted"] * 1e3
        row["error"] = result["predicted"] / seconds - 1
    row |= {"whole ms": result["step s"] * 1e3, "whole MFU": work / result["step s"] / full}
    return row | {"details": result}


def compare(rows: list[Row]) -> None:
    """Put into the rows of one case what they are against each other.

    Of steps of as many micro-batches: ours over Megatron-core, and over the better of those that
    it interleaves, if they train the same; and the emulated rank over the real one.
    """
    timed = [row for row in rows if "step ms" in row]
    for count in dict.fromkeys(row.get("micro-batches") for row in timed):
        _compare([row for row in timed if row.get("micro-batches") == count])


def _compare(rows: list[Row]) -> None:
    timed: dict[str, list[Row]] = {side: [] for side in (MEGATRON, OURS, EMULATED)}
    for row in rows:
        timed[row["side"].partition(":")[0]].append(row)
    ours, same = timed[OURS], list[Row]()
    for theirs in timed[MEGATRON] if ours else ():
        if difference := _difference(theirs, ours[0]):
            theirs["failed"] = f"it trains something else, so nothing is compared: {difference}"
        else:
            same.append(theirs)
    straight = [row for row in same if row.get("schedule", "1f1b") == "1f1b"]
    overlapped = [row for row in straight if row["side"] != MEGATRON]
    straight = [row for row in straight if row not in overlapped]
    others = [row for row in same if row.get("schedule", "1f1b") != "1f1b"]
    for row in ours:
        for theirs in straight:
            row["over megatron-core"] = theirs["step ms"] / row["step ms"]
            if theirs.get("peak GiB") and row.get("peak GiB"):
                row["of its peak"] = row["peak GiB"] / theirs["peak GiB"]
        for theirs in overlapped:
            row["over tp-overlap"] = theirs["step ms"] / row["step ms"]
        if others:
            best = min(theirs["step ms"] for theirs in others)
            row["over interleaved"] = best / row["step ms"]
    real = {row["plan"]: row for row in ours if "schedule" not in row}
    if real:  # whose plan is the file's
        real[_FILE] = min(real.values(), key=lambda row: float(row["step ms"]))
    for row in timed[EMULATED]:
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
