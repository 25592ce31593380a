"""Timelines as a trace that viewers open."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_dhellam.files import save_text
from lightning_dhellam.plan import Lane, Strand
from lightning_dhellam.search.cluster import Prediction, StagePrediction
from lightning_dhellam.search.model import Interval

_COLOURS = {Strand.FORWARD: "rail_response", Strand.BACKWARD: "rail_animation"}


def save_trace(path: Path | str, timelines: Mapping[str, Sequence[Interval]]) -> None:
    """Write timelines as a trace that Perfetto (ui.perfetto.dev) and Chrome open.

    Each entry of `timelines`, such as `predicted` and `measured`, becomes a process, and each
    lane a thread of it.
    """
    events: list[dict[str, object]] = []
    for process, (title, intervals) in enumerate(timelines.items(), start=1):
        events += _process(process, title, intervals)
    _save(path, events)


def save_predicted_trace(path: Path | str, step: Prediction) -> None:
    """Write what is predicted of a step as such a trace.

    The first process has the lanes of one rank for a pair of layers in the middle of the step; of a
    pipeline the second has a thread for each stage, with its visits from the step's start on, the
    reduction of gradients and the optimizer.
    """
    title = f"{step.model} on {step.cluster}: a pair of layers of one rank"
    events = _process(1, title, step.intervals)
    if any(stage.visits for stage in step.stages):
        events.append(_named("process_name", 2, 0, f"{step.model} on {step.cluster}: the stages"))
        for stage in step.stages:
            events.append(_named("thread_name", 2, stage.stage, f"stage {stage.stage}"))
            events.extend(_visits(stage, step.seconds))
    _save(path, events)


def _visits(stage: StagePrediction, end: float) -> list[dict[str, object]]:
    """What a stage does when, up to the end of the step."""
    spans = [(visit.works, visit.start, visit.end) for visit in stage.visits]
    begin = end - stage.optimizer
    spans.append(("reduction", begin - stage.reduction, begin))
    spans.append(("optimizer", begin, end))
    return [
        {
            "ph": "X",
            "name": name,
            "cat": "stage",
            "pid": 2,
            "tid": stage.stage,
            "ts": start * 1e6,
            "dur": (stop - start) * 1e6,
        }
        for name, start, stop in spans
        if stop > start
    ]


def _save(path: Path | str, events: list[dict[str, object]]) -> None:
    save_text(Path(path), json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")


def _process(process: int, title: str, intervals: Sequence[Interval]) -> list[dict[str, object]]:
    used = {interval.lane for interval in intervals}
    threads = {lane: number for number, lane in enumerate(Lane) if lane in used}
    return [
        _named("process_name", process, 0, title),
        *(_named("thread_name", process, number, str(lane)) for lane, number in threads.items()),
        *(_event(interval, process, threads[interval.lane]) for interval in intervals),
    ]


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
