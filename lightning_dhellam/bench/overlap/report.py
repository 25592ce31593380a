"""The table of `dhellam bench overlap`: a row for each plan of each cell, and the bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lightning_dhellam.autosearch.options import MEMORY_SLACK
from lightning_dhellam.bench.overlap.cells import Cell
from lightning_dhellam.bench.overlap.settings import Settings
from lightning_dhellam.bench.report import Row
from lightning_dhellam.bench.rounds import Times
from lightning_dhellam.bench.shapes import SLOWER

COLUMNS = (
    "cell", "plan", "layer ms", "over megatron", "of bound", "exposed ms", "step ms",
    "step over megatron", "spread ms", "predicted ms", "error", "step error", "peak GiB",
    "of sequential", "slots MiB", "of limit", "recompute", "saved MiB", "of none", "parity",
    "farthest",
)  # fmt: skip
COMPUTE, BOUND = "compute", "bound"
"""Rows that are no plans: collectives that take no time, and what no order can beat."""
_PUBLISHED_LONG = "DHelix is 1.24 times as fast as Megatron with sequences of 32,768 tokens"
_PUBLISHED_EXPERTS = "DHelix is 1.15 times as fast as Megatron"
_PUBLISHED = "a layer takes 21.9 ms with Megatron, 19.2 with TWIST, 16.5 with nothing exposed"


@dataclass(frozen=True)
class PlanFigures:
    """What is known of a plan in a cell besides the times of its steps.

    Attributes:
        predicted: Seconds that the simulator says of the shorter and the longer step.
        peak: The most bytes in use during the longer step.
        slots: The same, of slots alone.
        parity: How far its results are from the sequential plan's; 0 when bitwise equal.
        farthest: The result that is farthest away, or `-`.
        search_seconds: What its search took, if it was searched.
        saved: Bytes of activations that a layer saves of a micro-batch.
        saved_by_none: The same, if nothing were made again.
        recompute: What backward makes again, in a word.
        limit: Bytes that slots may take; None where nothing is to fit.
    """

    predicted: tuple[float, float]
    peak: float
    slots: float
    parity: float
    farthest: str
    search_seconds: float | None
    saved: float
    saved_by_none: float
    recompute: str
    limit: float | None


def rows_of(
    cell: Cell,
    pieces: int,
    bound: float,
    timed: Mapping[str, Sequence[Times]],
    figures: Mapping[str, PlanFigures],
) -> list[Row]:
    """The rows of one cell.

    Args:
        cell: The cell that was measured.
        pieces: Micro-batches that the longer step has more than the shorter one.
        bound: Seconds that the busier lane alone needs for a layer and micro-batch.
        timed: The shorter and the longer step of each plan, and of `COMPUTE`.
        figures: What else is known of each plan.
    """

    def layer(few: float, many: float) -> float:
        return (many - few) / (pieces * cell.layers)

    seconds = {name: layer(few.median, many.median) for name, (few, many) in timed.items()}
    seconds[BOUND] = max(seconds[COMPUTE], bound)
    rows: list[Row] = []
    for name in (BOUND, COMPUTE, *figures):
        row: Row = {"cell": cell.name, "plan": name, "layer ms": seconds[name] * 1e3}
        row["over megatron"] = seconds["megatron"] / seconds[name]
        row["of bound"] = seconds[BOUND] / seconds[name]
        if name != BOUND:
            step = timed[name][1]
            row |= {"step ms": step.median * 1e3, "spread ms": step.spread * 1e3}
            row["step over megatron"] = timed["megatron"][1].median / step.median
        if name in figures:
            found = figures[name]
            predicted = layer(*found.predicted)
            row |= {
                "exposed ms": (seconds[name] - seconds[COMPUTE]) * 1e3,
                "predicted ms": predicted * 1e3,
                "error": predicted / seconds[name] - 1,
                "step error": found.predicted[1] / timed[name][1].median - 1,
                "peak GiB": found.peak / 2**30,
                "of sequential": found.peak / figures["sequential"].peak,
                "slots MiB": found.slots / 2**20,
                "recompute": found.recompute,
                "saved MiB": found.saved / 2**20,
                "of none": found.saved / found.saved_by_none,
                "parity": found.parity,
                "farthest": found.farthest,
                "search s": found.search_seconds,
            }
            if found.limit is not None:
                row["of limit"] = found.slots / found.limit
        rows.append(row)
    return rows


def notes_of(settings: Settings, cells: Sequence[Cell]) -> Row:
    """What is to be said above the table before anything is measured."""
    notes: Row = {
        "EMULATED": "one rank of 8, or of 32 where 4 share each sequence, its links played: times"
        " mean something, numbers do not",
        "steps": f"of {settings.few} and {settings.many} micro-batches; a layer is their"
        " difference",
    }
    if not settings.rehearses and any(cell.shape == "b" for cell in cells):
        notes["published for b on 8 H200"] = _PUBLISHED
    if not settings.rehearses and any(cell.shape == "c" for cell in cells):
        notes["published for c on A800"] = _PUBLISHED_LONG
    if not settings.rehearses and any(cell.shape == "m" for cell in cells):
        notes["published for m on A800"] = _PUBLISHED_EXPERTS
    if settings.memory_slack != MEMORY_SLACK:
        notes["memory slack"] = f"{settings.memory_slack:g} instead of {MEMORY_SLACK:g}"
    if settings.rehearses:
        notes["REHEARSAL"] = f"in miniature, links {SLOWER} times slower"
    return notes


def lever_notes(cells: Sequence[Cell], rows: Sequence[Row]) -> Row:
    """What each lever does to the searched plan, against the same cell without it."""
    found = {row["cell"]: row["layer ms"] for row in rows if row["plan"] == "auto"}
    plain = {cell.without_lever: cell.name for cell in cells if not cell.lever}
    notes: Row = {}
    for cell in cells:
        before = plain.get(cell.without_lever)
        if cell.lever and cell.name in found and before in found:
            gain = found[before] / found[cell.name] - 1
            notes[f"lever: {cell.lever}"] = f"auto {gain:+.1%} faster than {before}"
    return notes


def fp8_notes(cells: Sequence[Cell], rows: Sequence[Row]) -> Row:
    """How much faster the searched plan is in 8 bits than the same cell without."""
    found = {row["cell"]: row["layer ms"] for row in rows if row["plan"] == "auto"}
    notes: Row = {}
    for cell in cells:
        plain = replace(cell, fp8=None, fp8_all_gather=False).name
        if cell.fp8 and {cell.name, plain} <= found.keys():
            notes[f"8 bits: {cell.name}"] = (
                f"auto {found[plain] / found[cell.name]:.3f} times as fast as without"
            )
    return notes


def recompute_notes(cells: Sequence[Cell], rows: Sequence[Row]) -> Row:
    """What making slots again costs the searched plan, against the same cell that keeps all."""
    found = {row["cell"]: row for row in rows if row["plan"] == "auto"}
    notes: Row = {}
    for cell in cells:
        plain = replace(cell, recompute="none").name
        if cell.recompute == "none" or not {cell.name, plain} <= found.keys():
            continue
        own, kept = found[cell.name], found[plain]
        notes[f"recompute: {cell.name}"] = (
            f"auto {own['layer ms'] / kept['layer ms'] - 1:+.1%} time against none, and"
            f" {1 - own['of none']:.0%} of activation bytes are not saved"
        )
    return notes


def limit_notes(cells: Sequence[Cell], rows: Sequence[Row]) -> Row:
    """How the searched plan of a cell that is to fit does against Megatron's choice that fits."""
    found = {(row["cell"], row["plan"]): row for row in rows}
    notes: Row = {}
    for cell in cells:
        own, other = (found.get((cell.name, plan)) for plan in ("auto", "megatron"))
        if cell.share is None or own is None or other is None:
            continue
        fits = "the least of its own that fits" if other["of limit"] <= 1 else "which does not fit"
        notes[f"limit: {cell.name}"] = (
            f"auto's step is {own['step over megatron']:.3f} × as fast as that of Megatron's order"
            f" with '{other['recompute']}', {fits}; activations take"
            f" {1 - own['of limit'] * cell.share:.0%} less than with none,"
            f" {1 - other['of limit'] * cell.share:.0%} with that"
        )
    return notes
