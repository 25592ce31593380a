"""What the trials of a search gave: the candidates, the winner, and the table that shows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from lightning_dhellam.plan import Lane
from lightning_dhellam.search.measure import Samples


@dataclass(frozen=True)
class Outcome:
    """What the trial of one candidate gave.

    Attributes:
        name: name of the plan.
        predicted: seconds of a step by the simulator.
        exposed: predicted seconds of communication while compute idles, by lane.
        measured: seconds of a real step, None if it was not measured.
        spread: half the distance from the p20 to the p80 of the measured seconds.
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
        """The seconds that count: the measured ones, if there are any."""
        return self.predicted if self.measured is None else self.measured


def measured(outcomes: Sequence[Outcome], table: Sequence[Sequence[float]]) -> list[Outcome]:
    """Return outcomes with the times of `table`, a row for each: medians, and half the spread."""
    found = []
    for outcome, row in zip(outcomes, table, strict=True):
        samples = Samples(tuple(row))
        spread = (samples.quantile(0.8) - samples.quantile(0.2)) / 2
        found.append(replace(outcome, measured=median(row), spread=spread))
    return found


def choose(outcomes: Sequence[Outcome], reference: str = "sequential") -> tuple[Outcome, str]:
    """Return the winner and why: the fastest measured one, if it beats `reference` beyond noise."""
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
    """Print the table of a search: each candidate, the winner, and what it gains."""
    head = ("plan", "predicted", "measured", "error", "exposed (predicted)")
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
    lines.extend(gains(outcomes, winner))
    return "\n".join(lines)


def _row(outcome: Outcome) -> tuple[str, str, str, str, str]:
    exposed = ", ".join(f"{lane} {time_text(s)}" for lane, s in outcome.exposed.items())
    measured = "-" if outcome.measured is None else time_text(outcome.measured)
    if outcome.measured is not None and outcome.spread:
        measured += f" ±{outcome.spread / outcome.measured:.1%}"
    error = "-" if outcome.error is None else f"{outcome.error:+.1%}"
    return outcome.name, time_text(outcome.predicted), measured, error, exposed or "-"


def gains(outcomes: Sequence[Outcome], winner: str) -> list[str]:
    """Say in a line, if there is anything to compare with, what the winner gains."""
    times = {outcome.name: outcome for outcome in outcomes}
    won = times[winner]
    found = []
    for name in ("sequential", "megatron"):
        other = times.get(name)
        if other is None or name == winner:
            continue
        both = other.measured is not None and won.measured is not None
        ratio = other.time / won.time if both else other.predicted / won.predicted
        remark = "" if both else " (predicted)"
        noise = other.spread + won.spread
        if both and not noise:
            remark = " (measured once: its noise is not known)"
        elif both and abs(other.time - won.time) <= noise:
            remark = " (within the noise)"
        found.append(f"{ratio:.2f}× over {name}{remark}")
    return [f"  speed-up: {', '.join(found)}"] if found else []


def time_text(seconds: float) -> str:
    """Print seconds in the unit that reads best: `8.77 ms`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.2f} {unit}"
    return f"{seconds / 1e-6:.0f} µs"
