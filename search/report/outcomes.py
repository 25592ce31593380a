"""What a search found, as text and as traces. Pictures are in `pictures`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning_dhellam.files import save_text
from lightning_dhellam.plan import Lane, Strand
from lightning_dhellam.search.model.simulate import Interval

_COLOURS = {Strand.FORWARD: "rail_response", Strand.BACKWARD: "rail_animation"}


@dataclass(frozen=True)
class Outcome:
    """One candidate of a search.

    Attributes:
        name: of the plan.
        predicted: seconds of a step by the simulator.
        exposed: predicted seconds of communication while compute idles, by lane.
        measured: seconds of a real step, None if it was not measured.
        spread: of the measured seconds: half the distance from their p20 to their p80.
    """

    name: str
    predicted: float
    exposed: Mapping[Lane, float]
    measured: float | None = None
    spread: float = 0.0

    @property
    def error(self) -> float | None:
        """How far the prediction is off, as a share of the measured time."""
        return self.predicted / self.measured - 1 if self.measured else None

    @property
    def time(self) -> float:
        """Seconds that count: measured if there are any."""
        return self.predicted if self.measured is None else self.measured


def choose(outcomes: Sequence[Outcome], reference: str = "sequential") -> tuple[Outcome, str]:
    """The winner, and why: the fastest measured one, if it beats `reference` by more than noise."""
    rivals = [o for o in outcomes if o.measured is not None] or list(outcomes)
    fastest = min(rivals, key=lambda o: o.time)
    safe = next((o for o in rivals if o.name == reference), None)
    if safe is None or fastest is safe:
        return fastest, "the fastest"
    gain, noise = safe.time - fastest.time, fastest.spread + safe.spread
    if gain <= noise:
        reason = (
            f"'{fastest.name}' beats it by {gain * 1e3:.3f} ms only, within the noise of"
            f" {noise * 1e3:.3f} ms"
        )
        return safe, reason
    return fastest, "the fastest"


def summary(outcomes: Sequence[Outcome], winner: str, reason: str = "the fastest") -> str:
    """The table of a search: each candidate, the winner, and what it gains."""
    head = ("plan", "predicted", "measured", "error", "exposed")
    rows = [head, *(_row(outcome) for outcome in sorted(outcomes, key=lambda o: o.time))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for row in rows:
        mark = "*" if row[0] == winner else " "
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append(f"{mark} {'  '.join(cells)}".rstrip())
    lines.insert(1, "  " + "-" * (sum(widths) + 2 * len(widths) - 2))
    lines.append(f"* installed: '{winner}', {reason}")
    lines.extend(_gains(outcomes, winner))
    return "\n".join(lines)


def _row(outcome: Outcome) -> tuple[str, str, str, str, str]:
    exposed = ", ".join(f"{lane} {time_text(s)}" for lane, s in outcome.exposed.items())
    measured = "-" if outcome.measured is None else time_text(outcome.measured)
    if outcome.measured is not None and outcome.spread:
        measured += f" ±{outcome.spread / outcome.measured:.1%}"
    error = "-" if outcome.error is None else f"{outcome.error:+.1%}"
    return outcome.name, time_text(outcome.predicted), measured, error, exposed or "-"


def _gains(outcomes: Sequence[Outcome], winner: str) -> list[str]:
    times = {outcome.name: outcome for outcome in outcomes}
    won = times[winner]
    gains = []
    for name in ("sequential", "megatron"):
        other = times.get(name)
        if other is None or name == winner:
            continue
        both = other.measured is not None and won.measured is not None
        ratio = other.time / won.time if both else other.predicted / won.predicted
        gains.append(f"{ratio:.2f}× over {name}{'' if both else ' (predicted)'}")
    return [f"  speed-up: {', '.join(gains)}"] if gains else []


def time_text(seconds: float) -> str:
    """Seconds in the unit that reads best: `8.77 ms`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds / 1e-6:.0f} µs"


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
