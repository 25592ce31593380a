"""The table of `dhellam bench throughput`: a row for each side of each case."""

from __future__ import annotations

from typing import Any

from lightning_dhellam.bench.report import Report, Row
from lightning_dhellam.bench.throughput.settings import ENGINE, ENGINES, OURS, Case, Job, is_ours

COLUMNS = (
    "case", "side", "tokens/s", "MFU", "ratio", "over bf16", "over engine", "peak GiB", "loss",
    "last loss", "loss apart", "grad norm", "TFLOP/s",
)  # fmt: skip


def add(report: Report, job: Job, result: Row, peak_tflops: float) -> None:
    """Put what a job has measured into the report, and compare the sides of its case."""
    row: Row = {"case": job.case, "side": job.side, **result}
    report.device = row.pop("device", report.device)
    operators = row.pop("operators", None)
    if operators:
        report.details[f"operators of {job.case} {job.side}"] = operators
    if "tokens" in row:
        rate = row["tokens"] / row["seconds"]
        flops = rate * Case.parse(job.case).flops_per_token
        row |= {"tokens/s": rate, "TFLOP/s": flops / 1e12, "MFU": flops / (peak_tflops * 1e12)}
        row |= {"loss": row["losses"][0], "last loss": row["losses"][-1]}
    report.rows.append(row)
    _compare([r for r in report.rows if r["case"] == job.case and "tokens/s" in r])


def _compare(rows: list[Row]) -> None:
    """Our rates over the better of the others, and how far apart the losses are at most.

    Rates in 8 bits are also compared with our own without, and with transformer-engine's.
    """
    mine = [row for row in rows if is_ours(row["side"])]
    engines = {row["side"]: row for row in rows if row["side"] in ENGINES}
    others = [row for row in rows if row not in mine and row["side"] not in engines]
    whole = next((row for row in mine if row["side"] == OURS), None)
    for ours in mine:
        if whole is not None and ours is not whole:
            ours["over bf16"] = ours["tokens/s"] / whole["tokens/s"]
        engine = engines.get(ours["side"].replace(OURS, ENGINE))
        if engine is not None:
            ours["over engine"] = ours["tokens/s"] / engine["tokens/s"]
        if not others:
            continue
        best: Any = max(others, key=lambda row: row["tokens/s"])
        ours["ratio"] = ours["tokens/s"] / best["tokens/s"]
        pairs = zip(ours["losses"], best["losses"], strict=True)
        ours["loss apart"] = max(abs(a - b) / abs(b) for a, b in pairs)
