"""`dhellam bench throughput`: whole training steps under a Trainer, against Hugging Face's Llama.

Both sides take the same batches from the same initial weights, several micro-batches of one
sample to an optimizer step. Ours is `bf16-mixed`: fp32 gradients and fp32 master weights. Theirs
is what a Lightning user writes today: `LlamaForCausalLM`, `bf16-true`, fused AdamW,
`accumulate_grad_batches`, eager or compiled; the faster of the two counts.

Every side of every case has a process of its own. The report is saved after each, so what was
measured stays when a later one fails or the budget ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from lightning_dhellam.bench.report import Report, Row, pick_device
from lightning_dhellam.bench.sides import SIDES, Shape
from lightning_dhellam.bench.workers import Budget, Workers

DESCRIPTION = "token rate and MFU of training steps, against Hugging Face under a plain Trainer"

COLUMNS = (
    "case", "side", "tokens/s", "MFU", "ratio", "peak GiB", "loss", "last loss", "loss apart",
    "grad norm", "TFLOP/s",
)  # fmt: skip
CASES = (
    "llama-3-8b:8:32000:8192:4",
    "llama-3-8b:8:128256:8192:4",
    "llama-3.2-3b:28:128256:8192:4",
    "llama-3-8b:8:32000:32768:2",
)
"""The most important first."""


def add_options(parser: ArgumentParser) -> None:
    """What to measure."""
    parser.add_argument(
        "--cases", type=list[str], default=list(CASES),
        help="preset:layers:vocabulary:sequence:micro-batches, the most important first",
    )  # fmt: skip
    parser.add_argument("--sides", type=list[str], default=list(SIDES))
    parser.add_argument("--steps", type=int, default=6, help="timed optimizer steps")
    parser.add_argument("--warm_up", type=int, default=3, help="optimizer steps before those")
    parser.add_argument("--plan", default="interleaved", help="of our side")
    parser.add_argument("--operators", type=bool, default=True, help="time ours by operator, once")
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="of the device")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal")
    parser.add_argument("--budget", type=float, default=1800.0, help="seconds for everything")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds for one side")


def run(options: Namespace) -> Report:
    """Measure the sides of the cases, as many as the budget allows."""
    budget = Budget(options.budget)
    device = pick_device(options.device)
    unknown = [side for side in options.sides if side not in SIDES]
    if unknown:
        raise ValueError(f"--sides: '{unknown[0]}' is not a side: use {', '.join(SIDES)}")
    for case in options.cases:
        Shape.parse(case)
    # Only the processes ask the device for its name: it would keep memory of this one.
    report = Report("throughput", device.type, COLUMNS, {"plan": options.plan})
    jobs = _jobs(options.cases, options.sides)
    log = Path(options.output) / "throughput.log"
    with Workers(log, budget, options.limit) as workers:
        for number, (case, side) in enumerate(jobs, 1):
            first = side == "ours" and case == options.cases[0]
            job = {
                "case": case, "side": side, "device": device.type, "plan": options.plan,
                "warm_up": options.warm_up, "steps": options.steps,
                "operators": options.operators and first,
            }  # fmt: skip
            print(f"throughput {number}/{len(jobs)}: {case} {side}", flush=True)
            result = workers.run(job, more=number < len(jobs))
            _add(report, case, side, result, options.peak_tflops)
            report.save(Path(options.output))
            print(f"  {report.rows[-1]} ({budget.left:.0f} s left)", flush=True)
    return report


def _jobs(cases: Sequence[str], sides: Sequence[str]) -> list[tuple[str, str]]:
    """Compiling takes longest and has lost so far: it waits for the next case's other sides."""
    jobs = [(case, side) for case in cases for side in sides]
    return sorted(jobs, key=lambda job: cases.index(job[0]) + 1.5 * (job[1] == "compiled"))


def _add(report: Report, case: str, side: str, result: Row, peak_tflops: float) -> None:
    row: Row = {"case": case, "side": side, **result}
    report.device = row.pop("device", report.device)
    operators = row.pop("operators", None)
    if operators:
        report.details[f"operators of {case}"] = operators
    if "tokens" in row:
        rate = row["tokens"] / row["seconds"]
        flops = rate * Shape.parse(case).flops_per_token
        row |= {"tokens/s": rate, "TFLOP/s": flops / 1e12, "MFU": flops / (peak_tflops * 1e12)}
        row |= {"loss": row["losses"][0], "last loss": row["losses"][-1]}
    report.rows.append(row)
    _compare([r for r in report.rows if r["case"] == case and "tokens/s" in r])


def _compare(rows: list[Row]) -> None:
    """Our rate over the better of the others, and how far apart the losses are at most."""
    others = [row for row in rows if row["side"] != "ours"]
    for ours in (row for row in rows if row["side"] == "ours"):
        if not others:
            continue
        best: Any = max(others, key=lambda row: row["tokens/s"])
        ours["ratio"] = ours["tokens/s"] / best["tokens/s"]
        pairs = zip(ours["losses"], best["losses"], strict=True)
        ours["loss apart"] = max(abs(a - b) / abs(b) for a, b in pairs)
