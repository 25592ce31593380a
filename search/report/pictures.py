"""Pictures of a search: timelines, pairwise overlap, exposed communication."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from lightning_dhellam.files import save_bytes
from lightning_dhellam.plan import Lane, Strand
from lightning_dhellam.search.measure import Key, Profile
from lightning_dhellam.search.model import Interval

COLOURS = {Strand.FORWARD: "#2f6db3", Strand.BACKWARD: "#e08a2c"}
IDLE = "#f1f1ee"
INK = "#2b2b2b"
FAINT = "#8a8a86"
LEAST = 0.02
"""Share of the longest operator's time below which an operator is left out of a heat map."""
_OVERLAP = LinearSegmentedColormap.from_list("overlap", ["#b6423a", "#f3e6c8", "#2f7d62"])
_SHADES = ("#b6423a", "#d9827b", "#8c5a9e", "#4f8f8b", "#7a7a3a", "#5d6d8a", "#b3706b", "#c29a4b")
"""One for every lane but compute."""
_LETTER = 0.6 / 72
"""Width of a letter in inches per point of font size."""
_FONT = 7.0
_ROW = 0.9
"""Inches that a lane takes."""
_THICK = 0.84
"""Share of them that its bars take."""


@dataclass(frozen=True)
class Panel:
    """A timeline in a picture.

    Attributes:
        title: text above the timeline.
        intervals: what every lane does.
        marks: moments in seconds at which a vertical line is drawn: ends of pairs of layers.
    """

    title: str
    intervals: Sequence[Interval]
    marks: Sequence[float] = ()


def save_timeline(path: Path | str, panels: Sequence[Panel]) -> None:
    """Draw timelines below each other on one scale: a row per lane, a colour per strand."""
    lanes = [_lanes(panel) for panel in panels]
    figure = new_figure(14, 0.9 + sum(0.5 + _ROW * len(rows) for rows in lanes))
    axes = figure.subplots(
        len(panels),
        1,
        sharex=True,
        squeeze=False,
        height_ratios=[len(rows) for rows in lanes],
    )[:, 0]
    end = max(interval.end for panel in panels for interval in panel.intervals)
    unit, scale = ("ms", 1e3) if end >= 1e-3 else ("µs", 1e6)
    for panel, rows, axis in zip(panels, lanes, axes, strict=True):
        _draw_timeline(axis, panel, rows, scale, end * scale)
    axes[-1].set_xlabel(f"time ({unit})", color=INK)
    handles = [Patch(color=colour, label=f"{s} strand") for s, colour in COLOURS.items()]
    handles.append(Patch(color=IDLE, label="idle"))
    figure.legend(handles=handles, loc="outside upper right", ncols=3, frameon=False, fontsize=9)
    save(figure, path)


def _lanes(panel: Panel) -> list[Lane]:
    used = {interval.lane for interval in panel.intervals}
    return [lane for lane in Lane if lane in used]


def _draw_timeline(axis: Axes, panel: Panel, lanes: list[Lane], scale: float, width: float) -> None:
    figure_width = 14 * 0.9
    for row, lane in enumerate(lanes):
        end = max(interval.end for interval in panel.intervals)
        axis.barh(row, end * scale, height=_THICK, color=IDLE, zorder=0)
        for interval in panel.intervals:
            if interval.lane is not lane:
                continue
            start, length = interval.start * scale, (interval.end - interval.start) * scale
            axis.barh(
                row,
                length,
                left=start,
                height=_THICK,
                color=COLOURS[interval.strand],
                edgecolor="white",
                linewidth=0.6,
            )
            room = length / width * figure_width
            label, turn = _label(interval.operator, room)
            if label:
                axis.text(
                    start + length / 2,
                    row,
                    label,
                    rotation=turn,
                    ha="center",
                    va="center",
                    fontsize=_FONT,
                    color="white",
                    clip_on=True,
                )
    for mark in panel.marks:
        axis.axvline(mark * scale, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=3)
    axis.set_yticks(range(len(lanes)), [str(lane) for lane in lanes])
    axis.set_ylim(len(lanes) - 0.5, -0.5)
    axis.set_xlim(0, width)
    axis.set_title(panel.title, loc="left", fontsize=10, color=INK)
    bare(axis)


def _label(operator: str, room: float) -> tuple[str, int]:
    """Return the name and its angle: in one line, in two, upright, or left out, as room allows."""
    broken = operator.replace(".", ".\n", 1)
    for text in (operator, broken):
        if max(map(len, text.split("\n"))) * _LETTER * _FONT <= room:
            return text, 0
    for text in (operator, broken):
        lines = text.split("\n")
        fits = max(map(len, lines)) * _LETTER * _FONT <= _ROW * _THICK
        if fits and len(lines) * 1.25 * _FONT / 72 <= room:
            return text, 90
    return "", 0


def hidden_shares(profile: Profile, least: float = 0.0) -> tuple[list[Key], list[Key], np.ndarray]:
    """Tell how much of a communication operator hides beside each other operator.

    Returns the communication keys, the keys of compute and of communication that was measured
    beside other communication, and their matrix: what starting both together saves against one
    after the other, as a share of the shorter; 1 is all, 0 nothing, and not a number where they
    were not measured together. Keys that take less than a share of `least` of the longest are left
    out of the second: they hide little of anything.
    """
    alone = {row.operator: row.median for row in profile.timings if row.partner is None}
    beside = {
        (row.operator, row.partner): row.median
        for row in profile.timings
        if row.partner and not row.lead
    }
    spare = set(profile.spares.values())
    # What the host waits for disturbs nobody.
    rows = [key for key in alone if profile.lanes[key].moves]
    columns = [key for key in alone if profile.lanes[key] is Lane.COMPUTE and key not in spare]
    columns += [key for key in rows if any((key, other) in beside for other in rows)]
    shares = np.full((len(rows), len(columns)), np.nan)
    for i, a in enumerate(rows):
        for j, b in enumerate(columns):
            if (a, b) in beside:
                both = max(beside[a, b], beside[b, a])
                saved = alone[a] + alone[b] - both
                shares[i, j] = np.clip(saved / min(alone[a], alone[b]), 0, 1)
    longest = max((alone[key] for key in columns), default=0.0)
    keep = [j for j, key in enumerate(columns) if alone[key] >= least * longest]
    return rows, [columns[j] for j in keep], shares[:, keep]


def save_heat_map(path: Path | str, profile: Profile, *, least: float = LEAST) -> None:
    """Draw the `hidden_shares` of a profile."""
    rows, columns, shares = hidden_shares(profile, least)
    figure = new_figure(max(6.0, 2.6 + 0.78 * len(columns)), 2.3 + 0.5 * max(1, len(rows)))
    axis = figure.subplots()
    image = axis.imshow(shares, cmap=_OVERLAP, vmin=0, vmax=1, aspect="auto")
    for (i, j), share in np.ndenumerate(shares):
        if not np.isnan(share):
            colour = "white" if share < 0.2 or share > 0.8 else INK
            axis.text(j, i, f"{share:.0%}", ha="center", va="center", fontsize=8.5, color=colour)
    axis.set_xticks(
        range(len(columns)), [_short(c) for c in columns], rotation=40, ha="right", fontsize=9
    )
    axis.set_yticks(range(len(rows)), [_short(r) for r in rows], fontsize=9)
    axis.set_xticks(np.arange(len(columns) + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(len(rows) + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=1.5)
    axis.set_title(
        f"Share of the communication (or of the shorter one) that hides · "
        f"{profile.fingerprint.device}",
        loc="left",
        fontsize=10,
        color=INK,
    )
    bare(axis)
    axis.tick_params(which="minor", length=0)
    bar = figure.colorbar(image, ax=axis, fraction=0.03, pad=0.02, format=lambda x, _: f"{x:.0%}")
    bar.outline.set_visible(False)
    save(figure, path)


def _short(key: Key) -> str:
    """Return a key without its layer, which the picture has no room for."""
    return key.rsplit("/", 1)[-1]


def save_exposed(
    path: Path | str,
    exposed: Mapping[str, Mapping[Lane, float]],
    steps: Mapping[str, float],
    measured: Mapping[str, float] | None = None,
) -> None:
    """Draw predicted exposed communication of each plan beside the rest of its step.

    Args:
        path: file of the picture.
        exposed: predicted exposed seconds by plan and lane, in the order of the bars.
        steps: predicted seconds of a whole step, by plan.
        measured: seconds of a real step, of the plans that were tried; marked where they end.
    """
    measured = measured or {}
    lanes = [lane for lane in Lane if any(lane in of for of in exposed.values())]
    shades = dict(zip(lanes, _SHADES, strict=False))
    longest = max(*steps.values(), *measured.values(), 0.0)
    unit, scale = ("ms", 1e3) if longest >= 1e-3 else ("µs", 1e6)
    figure = new_figure(9, 1.3 + 0.5 * len(exposed))
    axis = figure.subplots()
    for row, (plan, lost) in enumerate(exposed.items()):
        left = (steps[plan] - sum(lost.values())) * scale
        axis.barh(row, left, height=0.66, color="#cfd8d3")
        for lane, seconds in lost.items():
            axis.barh(row, seconds * scale, left=left, height=0.66, color=shades[lane])
            left += seconds * scale
        share = sum(lost.values()) / steps[plan]
        text = f"predicted {steps[plan] * scale:.1f} {unit}, {share:.0%} exposed"
        if plan in measured:
            end = measured[plan] * scale
            axis.plot([end, end], [row - 0.4, row + 0.4], color=INK, linewidth=1.5)
            text += f"; measured {end:.1f} {unit}"
            left = max(left, end)
        axis.text(left + longest * scale * 0.01, row, text, va="center", fontsize=9, color=INK)
    axis.set_yticks(range(len(exposed)), list(exposed))
    axis.set_ylim(len(exposed) - 0.5, -0.5)
    axis.set_xlim(0, longest * scale * (1.65 if measured else 1.4))
    axis.set_xlabel(f"time of a step ({unit}): bars are predicted by the simulator", color=INK)
    handles: list[Artist] = [Patch(color="#cfd8d3", label="compute, with hidden communication")]
    handles += [Patch(color=shades[lane], label=f"exposed {lane}") for lane in lanes]
    if measured:
        handles.append(Line2D([], [], color=INK, linewidth=1.5, label="end of a measured step"))
    figure.legend(
        handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=9
    )
    bare(axis)
    save(figure, path)


def new_figure(width: float, height: float) -> Figure:
    """Make an empty picture of so many inches."""
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def bare(axis: Axes) -> None:
    """Take frame and ticks away from axes: what is not data."""
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, colors=INK)


def save(figure: Figure, path: Path | str) -> None:
    """Write a picture to a file, whole or not at all."""
    data = io.BytesIO()
    figure.savefig(data, format="png")
    save_bytes(Path(path), data.getvalue())
