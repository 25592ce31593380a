"""Times every kernel of the backends that were chosen, and what else a user could run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from lightning_dhellam.bench.kernels.cases import Call, Case, all_cases
from lightning_dhellam.bench.kernels.report import (
    COLUMNS,
    COMPILED,
    EAGER,
    LIGER,
    OURS,
    add_copy,
    row_of,
)
from lightning_dhellam.bench.kernels.rivals import eager_calls, liger_calls
from lightning_dhellam.bench.kernels.settings import Settings
from lightning_dhellam.bench.processes import Budget
from lightning_dhellam.bench.report import Report, Row, device_name, pick_device
from lightning_dhellam.bench.timing import copy_bandwidth, rotations, seconds
from lightning_dhellam.kernels import choose, parity

_SIZES = (4096, 1001)
"""Widths of the parity check: one that is wide and even, one that is neither."""


def measure(settings: Settings, folder: Path) -> Report:
    """Measure every kernel at every size, as far as the budget goes.

    Raises:
        ValueError: One of the kernels that are asked for does not exist.
    """
    budget = Budget(settings.budget)
    device = pick_device(settings.device)
    kernels = choose.choose(device, torch.bfloat16)
    notes = {"backends": str(kernels), "dtype": "bfloat16"}
    report = Report("kernels", device_name(device), COLUMNS, notes)
    cases = _cases(settings, device)
    wrong = {operator: check(kernels, operator, device) for operator in parity.CASES}
    rows = [row_of(case, wrong[case.operator]) for case in cases]
    report.rows += rows
    for column, implementation in _implementations(kernels, settings.compiled):
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
                add_copy(row, case.moved, copy_bandwidth(device, case.moved))
            print(f"{case.name} {case.tokens} x {case.width}: {column} {row[column]}", flush=True)
        report.save(folder)
    return report


def _cases(settings: Settings, device: torch.device) -> list[Case]:
    """The kernels that are asked for, at every size."""
    cases = all_cases(settings.tokens, settings.hidden, settings.vocabulary, device)
    if settings.kernels is None:
        return cases
    known = dict.fromkeys(case.name for case in cases)
    unknown = [name for name in settings.kernels if name not in known]
    if unknown:
        raise ValueError(f"--kernels: '{unknown[0]}' is not a kernel: use {', '.join(known)}")
    return [case for case in cases if case.name in settings.kernels]


def check(kernels: choose.Kernels, operator: str, device: torch.device) -> list[str]:
    """What the chosen backend of `operator` gets wrong, line by line; none when it may be timed."""
    rows = 1027 if device.type == "cuda" else 13
    draws = [parity.Draw(rows, width, torch.bfloat16, device) for width in _SIZES]
    return [
        line for draw in draws for line in parity.check(operator, getattr(kernels, operator), draw)
    ]


Implementation = Callable[[Case], Call | None]


def _implementations(
    kernels: choose.Kernels, compiled: bool
) -> Iterator[tuple[str, Implementation]]:
    """The columns in the order in which they are filled, and whose times stand there."""
    eager, liger = eager_calls(), liger_calls()

    def plain(case: Case) -> Call:
        return eager.get(case.name, case.plain())

    def compile_(case: Case) -> Call:
        torch._dynamo.reset()
        return torch.compile(plain(case), dynamic=False)

    yield OURS, lambda case: case.ours(kernels)
    yield LIGER, lambda case: liger.get(case.name)
    yield EAGER, plain
    if compiled:
        yield COMPILED, compile_


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
    """The bytes per second that `call` moves."""
    sets = [case.make() for _ in range(rotations(case.moved))]
    calls = [lambda arguments=arguments: call(*arguments, *case.extra) for arguments in sets]
    with torch.no_grad():
        return case.moved / seconds(calls, device, captured=case.captured)
