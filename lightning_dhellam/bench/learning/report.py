"""The table and the picture of `dhellam bench learning`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning_dhellam.bench.learning.settings import BF16
from lightning_dhellam.bench.learning.side import Curve
from lightning_dhellam.bench.report import Row

COLUMNS = (
    "precision", "steps", "loss", "validation loss", "over bf16", "farthest", "left out",
    "tokens/s", "minutes",
)  # fmt: skip


def row_of(name: str, curve: Curve, plain: Curve | None) -> Row:
    """A row of one precision; the distances are relative, of validation losses from those of bf16.

    `farthest` is the largest of the second half of all steps, where both have been validated.
    """
    lesson = curve.lesson
    tokens = len(curve.losses) * lesson["batch_size"] * lesson["sequence_length"]
    row: Row = {
        "precision": name,
        "steps": len(curve.losses),
        "loss": curve.losses[-1] if curve.losses else None,
        "validation loss": curve.validation[-1][1] if curve.validation else None,
        "left out": curve.skipped,
        "tokens/s": tokens / curve.seconds if curve.seconds else None,
        "minutes": curve.seconds / 60,
        "validation": curve.validation,
    }
    if not curve.is_whole:
        row["failed"] = f"{len(curve.losses)} of {lesson['steps']} steps: run the command again"
    found = apart(curve, plain) if plain is not None and name != BF16 else {}
    if found:
        late = [abs(value) for step, value in found.items() if 2 * step >= lesson["steps"]]
        row["over bf16"] = f"{found[max(found)]:+.3%}"
        row["farthest"] = f"{max(late, default=abs(found[max(found)])):.3%}"
    return row


def apart(curve: Curve, plain: Curve) -> dict[int, float]:
    """How much larger the validation losses are than those of bf16, relative to them, by steps."""
    others = dict(plain.validation)
    return {step: loss / others[step] - 1 for step, loss in curve.validation if step in others}


def draw(curves: Mapping[str, Curve], path: Path) -> None:
    """Draw the validation losses, and how far they are from those of bf16."""
    # Drawing needs matplotlib, which takes a second to load.
    from lightning_dhellam.search.report.pictures import FAINT, new_figure, save

    figure = new_figure(11, 4)
    left, right = figure.subplots(1, 2)
    plain = curves.get(BF16)
    for name, curve in curves.items():
        if not curve.validation:
            continue
        steps, losses = zip(*curve.validation, strict=True)
        left.plot(steps, losses, label=name, linewidth=1.2)
        found = apart(curve, plain) if plain is not None else {}
        right.plot(list(found), [100 * value for value in found.values()], linewidth=1.2)
    for sign in (-0.5, 0.5):
        right.axhline(sign, color=FAINT, linewidth=0.8, linestyle="--")
    left.set(xlabel="steps", ylabel="validation loss")
    right.set(xlabel="steps", ylabel="% over bf16")
    left.legend(frameon=False)
    save(figure, path)
