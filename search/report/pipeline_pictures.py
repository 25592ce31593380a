"""Pictures of pipelines: a row for each stage, a colour for each strand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from lightning_dhellam.pipeline.schedules import Part, Work
from lightning_dhellam.plan import Strand
from lightning_dhellam.search.pipeline import PipelineRun, VisitInterval
from lightning_dhellam.search.report.pictures import (
    COLOURS,
    FAINT,
    IDLE,
    INK,
    bare,
    new_figure,
    save,
)

_WIDTH = 16.0
LATE = "#f3cfa4"
"""Gradients of weights that were separated from the others."""
_THICK = 0.86
_LETTER = 0.075
"""Inches that a digit takes."""


def save_pipelines(path: Path | str, runs: Mapping[str, PipelineRun], *, unit: str = "") -> None:
    """Draw steps below each other on one scale.

    A visit of two strands is split: forward above, backward below. Numbers are micro-batches,
    where there is room for them.

    Args:
        path: file of the picture.
        runs: steps to draw, by title.
        unit: unit of the times, if they are not seconds.
    """
    stages = [len(run.stages) for run in runs.values()]
    figure = new_figure(_WIDTH, 1.0 + sum(0.45 + 0.26 * rows for rows in stages))
    axes = figure.subplots(len(runs), 1, sharex=True, squeeze=False, height_ratios=stages)[:, 0]
    end = max(run.seconds for run in runs.values())
    scale = 1e3 if not unit and end < 1 else 1.0
    for axis, (title, run) in zip(axes, runs.items(), strict=True):
        _draw(axis, title, run, scale, end * scale)
    axes[-1].set_xlabel(f"time ({unit or ('ms' if scale > 1 else 's')})", color=INK)
    handles = [Patch(color=colour, label=f"{strand}") for strand, colour in COLOURS.items()]
    parts = {work.part for run in runs.values() for visit in _visits(run) for work in visit.works}
    if Part.WEIGHT in parts:
        handles.append(Patch(color=LATE, label="weight gradients alone"))
    handles.append(Patch(color=IDLE, label="idle"))
    figure.legend(handles=handles, loc="outside upper right", ncols=4, frameon=False, fontsize=9)
    save(figure, path)


def _visits(run: PipelineRun) -> Iterator[VisitInterval]:
    for use in run.stages:
        yield from use.intervals


def _draw(axis: Axes, title: str, run: PipelineRun, scale: float, width: float) -> None:
    """Draw one panel. Bars of a colour are one collection: there are thousands of them."""
    room = _WIDTH * 0.93 / width
    widest = _LETTER * len(str(run.schedule.micro_batches - 1)) + 0.04
    for stage, use in enumerate(run.stages):
        axis.barh(stage, run.seconds * scale, height=_THICK, color=IDLE, zorder=0)
        bars: dict[tuple[str, float, float], list[tuple[float, float]]] = {}
        for visit in use.intervals:
            start, length = visit.start * scale, (visit.end - visit.start) * scale
            for work, low, high in _halves(visit):
                bars.setdefault((_colour(work), low, high), []).append((start, length))
                if length * room > widest:
                    _write(axis, start + length / 2, stage + (low + high) / 2, work)
        for (colour, low, high), parts in bars.items():
            axis.broken_barh(
                parts,
                (stage + low, high - low),
                facecolors=colour,
                edgecolor="white",
                linewidth=0.4,
            )
    axis.axvline(run.seconds * scale, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=3)
    axis.set_yticks(range(len(run.stages)), [str(stage) for stage in range(len(run.stages))])
    axis.set_ylim(len(run.stages) - 0.5, -0.5)
    axis.set_xlim(0, width)
    axis.set_title(title, loc="left", fontsize=10, color=INK)
    bare(axis)


def _halves(visit: VisitInterval) -> Iterator[tuple[Work, float, float]]:
    """Give each work of a visit, and where its bar begins and ends, from the middle of the row."""
    half = _THICK / 2
    if len(visit.works) == 1:
        yield visit.works[0], -half, half
    else:
        for work in visit.works:
            yield (work, -half, 0.0) if work.strand is Strand.FORWARD else (work, 0.0, half)


def _colour(work: Work) -> str:
    return LATE if work.part is Part.WEIGHT else COLOURS[work.strand]


def _write(axis: Axes, x: float, y: float, work: Work) -> None:
    colour = INK if work.part is Part.WEIGHT else "white"
    text = str(work.micro_batch)
    label = axis.text(x, y, text, ha="center", va="center", fontsize=6, color=colour, clip_on=True)
    # It stands inside of its bar; measuring hundreds of them would take as long as drawing.
    label.set_in_layout(False)
