"""`dhellam bench kernels`: memory-bound kernels against a device copy of as many bytes.

GB/s counts the bytes that the operator must move, each input read once and each output written
once, for every implementation alike. An operator that fails its parity check is not timed.
Compiling takes longest, so those columns are filled last, as far as the budget goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from jsonargparse import ArgumentParser, Namespace

from lightning_dhellam.bench.cases import Call, Case, all_cases
from lightning_dhellam.bench.report import Report, Row, device_name, pick_device
from lightning_dhellam.bench.rivals import eager_calls, liger_calls
from lightning_dhellam.bench.timing import copy_bandwidth, rotations, seconds
from lightning_dhellam.bench.workers import Budget
from lightning_dhellam.kernels import choose, parity

DESCRIPTION = "memory-bound kernels: GB/s against a device copy, torch eager, compiled and Liger"

OURS = "ours GB/s"
COLUMNS = (
    "kernel", "tokens", "width", "ours us", OURS, "copy GB/s", "of copy",
    "eager GB/s", "compiled GB/s", "liger GB/s",
)  # fmt: skip
_SIZES = (4096, 1001)
"""Widths of the parity check: one that is wide and even, one that is neither."""


def add_options(parser: ArgumentParser) -> None:
    """What to measure."""
    parser.add_argument("--kernels", type=list[str], default=None, help="names of some")
    parser.add_argument("--tokens", type=list[int], default=[8192, 32768], help="rows")
    parser.add_argument("--hidden", type=list[int], default=[4096, 8192], help="model widths")
    parser.add_argument("--vocabulary", type=list[int], default=[32000, 128256], help="columns")
    parser.add_argument("--compiled", type=bool, default=True, help="time torch.compile as well")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a rehearsal")
    parser.add_argument("--budget", type=float, default=900.0, help="seconds for everything")


def run(options: Namespace) -> Report:
    """Measure every kernel at every size, as far as the budget goes."""
    budget = Budget(options.budget)
    device = pick_device(options.device)
    kernels = choose.choose(device, torch.bfloat16)
    notes = {"backends": str(kernels), "dtype": "bfloat16"}
    report = Report("kernels", device_name(device), COLUMNS, notes)
    cases = all_cases(options.tokens, options.hidden, options.vocabulary, device)
    if options.kernels is not None:
        known = dict.fromkeys(case.name for case in cases)
        unknown = [name for name in options.kernels if name not in known]
        if unknown:
            raise ValueError(f"--kernels: '{unknown[0]}' is not a kernel: use {', '.join(known)}")
        cases = [case for case in cases if case.name in options.kernels]
    wrong = {operator: check(kernels, operator, device) for operator in parity.CASES}
    rows = [_row(case, wrong[case.operator]) for case in cases]
    report.rows += rows
    for column, implementation in _implementations(kernels, options.compiled):
        for case, row in zip(cases, rows, strict=True):
            call = implementation(case)
            if call is None or "failed" in row:
                continue
            if not budget.left:
                report.notes["budget"] = f"ended before '{column}' of every kernel was measured"
                break
            # Only a rival may have to wait for the device, which cannot be captured.
            captured = case.captured or column == OURS
            _measure(row, column, replace(case, captured=captured), call, device)
            if column == OURS and "failed" not in row:
                copy = copy_bandwidth(device, case.moved)
                row |= {"ours us": case.moved / row[OURS] / 1e3, "copy GB/s": copy / 1e9}
                row["of copy"] = f"{row[OURS] * 1e9 / copy:.0%}"
            print(f"{case.name} {case.tokens} x {case.width}: {column} {row[column]}", flush=True)
        report.save(Path(options.output))
    return report


def check(kernels: choose.Kernels, operator: str, device: torch.device) -> list[str]:
    """What the chosen backend of `operator` gets wrong; empty when it may be timed."""
    rows = 1027 if device.type == "cuda" else 13
    draws = [parity.Draw(rows, width, torch.bfloat16, device) for width in _SIZES]
    return [
        line for draw in draws for line in parity.check(operator, getattr(kernels, operator), draw)
    ]


def _row(case: Case, wrong: list[str]) -> Row:
    row: Row = {"kernel": case.name, "tokens": case.tokens, "width": case.width}
    return row | {"failed": "; ".join(wrong)} if wrong else row


Implementation = Callable[[Case], Call | None]


def _implementations(
    kernels: choose.Kernels, compiled: bool
) -> Iterator[tuple[str, Implementation]]:
    """Columns in the order in which they are filled, and whose times stand there."""
    eager, liger = eager_calls(), liger_calls()

    def plain(case: Case) -> Call:
        return eager.get(case.name, case.plain())

    def compile_(case: Case) -> Call:
        torch._dynamo.reset()
        return torch.compile(plain(case), dynamic=False)

    yield OURS, lambda case: case.ours(kernels)
    yield "liger GB/s", lambda case: liger.get(case.name)
    yield "eager GB/s", plain
    if compiled:
        yield "compiled GB/s", compile_


def _measure(row: Row, column: str, case: Case, call: Call, device: torch.device) -> None:
    """Put the rate into the row, or why there is none; a rival's failure is the rival's."""
    try:
        row[column] = _rate(case, call, device) / 1e9
    except Exception as error:
        if column == OURS:
            row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0]
        row[column] = type(error).__name__
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _rate(case: Case, call: Call, device: torch.device) -> float:
    """Bytes per second."""
    sets = [case.make() for _ in range(rotations(case.moved))]
    calls = [lambda arguments=arguments: call(*arguments, *case.extra) for arguments in sets]
    with torch.no_grad():
        return case.moved / seconds(calls, device, captured=case.captured)
