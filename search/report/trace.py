"""Timelines as a trace that viewers open."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_dhellam.files import save_text
from lightning_dhellam.plan import Lane, Strand
from lightning_dhellam.search.model import Interval

_COLOURS = {Strand.FORWARD: "rail_response", Strand.BACKWARD: "rail_animation"}


def save_trace(path: Path | str, timelines: Mapping[str, Sequence[Interval]]) -> None:
    """Write timelines as a trace that Perfetto (ui.perfetto.dev) and Chrome open.

    Each entry of `timelines`, such as `predicted` and `measured`, becomes a process, and each
    lane a thread of it.
    """
    events: list[dict[str, object]] = []
    for process, (title, intervals) in enumerate(timelines.items(), start=1):
        events.append(_named("process_name", process, 0, title))
        used = {interval.lane for interval in intervals}
        threads = {lane: number for number, lane in enumerate(Lane) if lane in used}
        events.extend(
            _named("thread_name", process, number, str(lane)) for lane, number in threads.items()
        )
        events.extend(_event(interval, process, threads[interval.lane]) for interval in intervals)
    save_text(Path(path), json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")


def _named(kind: str, process: int, thread: int, name: str) -> dict[str, object]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}


def _event(interval: Interval, process: int, thread: int) -> dict[str, object]:
    return {
        "ph": "X",
        "name": f"{interval.strand}/{interval.operator}",
        "cat": str(interval.strand),
        "pid": process,
        "tid": thread,
        "ts": interval.start * 1e6,
        "dur": (interval.end - interval.start) * 1e6,
        "cname": _COLOURS[interval.strand],
        "args": {"layer": interval.layer, "micro_batch": interval.micro_batch},
    }
