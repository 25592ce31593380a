"""What a page shows, as plain values, and the file that shows it.

The file has style, script and data in it, and asks for nothing else. The data are there once, as
JSON, and its script draws all from them.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from lightning_dhellam.files import save_text
from lightning_dhellam.plan import Issue, Lane, Plan
from lightning_dhellam.search.model import Interval

_MOST = 20_000
"""Bars of a timeline: more would make the file slow to open."""
_DIGITS = 12
"""Decimal places of a time in seconds: a picosecond."""


@dataclass(frozen=True)
class View:
    """A timeline.

    Attributes:
        title: of the timeline.
        lanes: names of its rows, from the top.
        strands: kinds of bars: `forward`, `backward`, or `both`.
        names: of what the bars are.
        bars: numbers of lane, strand and name, then layer and micro-batch or None, start and
            seconds; by their starts.
        end: seconds at which the last one ends.
        window: seconds from and to which is shown at first.
        note: what is not in it.
        scale: timelines of one number are on one scale, and move and zoom together.
    """

    title: str
    lanes: Sequence[str]
    strands: Sequence[str]
    names: Sequence[str]
    bars: Sequence[tuple[int, int, int, int | None, int | None, float, float]]
    end: float
    window: tuple[float, float]
    note: str = ""
    scale: int = 0


@dataclass(frozen=True)
class PlanView:
    """A plan: `strand, lane, operator, remarks` of each row, or what else the row is."""

    title: str
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Table:
    """Cells as text; `numbers` are the columns of numbers, and `best` is a row to mark."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[int] = ()
    best: int | None = None


@dataclass(frozen=True)
class BarRow:
    """A bar: sizes of its parts, the text behind it, the size at which a mark stands, and from
    which size to which it may end."""

    name: str
    parts: Sequence[float]
    text: str
    mark: float | None = None
    error: tuple[float, float] | None = None


@dataclass(frozen=True)
class Bars:
    """Stacked bars on one scale.

    Attributes:
        title: of all of them.
        parts: what the parts of each are.
        rows: the bars.
        marked: what a mark means; empty where there is none.
        limit: size at which all have a mark.
        best: number of the bar to point out.
    """

    title: str
    parts: Sequence[str]
    rows: Sequence[BarRow]
    marked: str = ""
    limit: float | None = None
    best: int | None = None


@dataclass(frozen=True)
class Group:
    """Tables and bars of one subject, over the whole width or half of it."""

    title: str
    tables: Sequence[Table] = ()
    bars: Sequence[Bars] = ()
    wide: bool = False


@dataclass(frozen=True)
class Overlap:
    """How much of each communication hides beside each operator; None where it is not known."""

    rows: Sequence[str]
    columns: Sequence[str]
    shares: Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Page:
    """All that a page shows, from the top.

    Attributes:
        title: of the page.
        facts: what it is about, as names and values.
        conclusions: what came of it, a sentence each.
        timelines: what happens when.
        plans: of the first timeline that is not the reference, by pair of graphs.
        groups: tables and bars.
        overlap: of operators that were measured together.
        changes: what would make steps faster, a sentence each.
    """

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    conclusions: Sequence[str] = ()
    timelines: Sequence[View] = ()
    plans: Sequence[PlanView] = ()
    groups: Sequence[Group] = ()
    overlap: Overlap | None = None
    changes: Sequence[str] = ()

    def as_values(self) -> dict[str, Any]:
        """All of it for JSON."""
        return {**asdict(self), "facts": list(self.facts.items())}


def save_page(path: Path, page: Page) -> None:
    """Write a page as HTML, whole or not at all."""
    data = json.dumps(page.as_values(), allow_nan=False, separators=(",", ":"))
    parts = {
        "title": html.escape(page.title),
        "style": _asset("page.css"),
        "script": _asset("page.js"),
        # A name such as `</script>` must not end the element that holds it.
        "data": data.replace("<", "\\u003c"),
    }
    head, *rest = _asset("page.html").split("{{")
    text = [head]
    for piece in rest:
        name, _, after = piece.partition("}}")
        text += [parts[name].rstrip("\n"), after]
    save_text(path, "".join(text))


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def view_of(
    title: str, intervals: Sequence[Interval], window: tuple[float, float] | None = None
) -> View:
    """The timeline of operators on lanes. Where there are too many, those of the window stay."""
    used = {interval.lane for interval in intervals}
    bars = [
        (str(i.lane), str(i.strand), i.operator, i.layer, i.micro_batch, i.start, i.end)
        for i in intervals
    ]
    return bars_view(title, bars, [str(lane) for lane in Lane if lane in used], window)


Bar = tuple[str, str, str, int | None, int | None, float, float]
"""Lane, strand, name, layer, micro-batch, start and end."""


def bars_view(
    title: str,
    bars: Iterable[Bar],
    lanes: Sequence[str],
    window: tuple[float, float] | None = None,
) -> View:
    """A timeline of anything. Where there are too many bars, those around the window stay."""
    bars = sorted(bars, key=lambda bar: bar[5])
    end = max((bar[6] for bar in bars), default=0.0)
    shown, note = window or (0.0, end), ""
    if len(bars) > _MOST:
        middle = sum(shown) / 2
        nearest = sorted(bars, key=lambda bar: abs((bar[5] + bar[6]) / 2 - middle))[:_MOST]
        note = f"{_MOST:,} of {len(bars):,} bars are here, those around the excerpt"
        bars = sorted(nearest, key=lambda bar: bar[5])
        shown = (max(shown[0], bars[0][5]), min(shown[1], bars[-1][6]))
    strands = sorted({bar[1] for bar in bars}, key=("forward", "backward", "both").index)
    names = list(dict.fromkeys(bar[2] for bar in bars))
    numbers = {name: number for number, name in enumerate(names)}
    rows = [
        (
            lanes.index(lane),
            strands.index(strand),
            numbers[name],
            layer,
            micro_batch,
            round(start, _DIGITS),
            round(stop - start, _DIGITS),
        )
        for lane, strand, name, layer, micro_batch, start, stop in bars
    ]
    return View(title, lanes, strands, names, rows, end, shown, note)


def plan_view(title: str, plan: Plan) -> PlanView:
    """The rows of a plan."""
    rows: list[tuple[str, ...]] = []
    for row in plan.rows:
        if isinstance(row, Issue):
            _, _, remarks = str(row).partition(row.operator)
            rows.append((str(row.strand), str(row.lane), row.operator, remarks))
        else:
            rows.append((str(row),))
    return PlanView(title, rows)
