"""Which schedule a pipeline goes by, and why, in a line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_dhellam.search.report.outcomes import Outcome, time_text


@dataclass(frozen=True)
class Walked:
    """The schedule that was chosen for a run.

    Attributes:
        name: its name.
        outcomes: what the trials of the best ones gave; none if only this one keeps the memory.
        reasons: why each schedule is behind the one that is predicted to be the best.
        kept: the schedule as plain values.
    """

    name: str
    outcomes: Sequence[Outcome]
    reasons: Mapping[str, str]
    kept: Mapping[str, Any]

    def __str__(self) -> str:
        found = {one.name: one for one in self.outcomes}
        if self.name not in found:
            others = "; ".join(f"'{n}': {why}" for n, why in self.reasons.items() if n != self.name)
            return f"schedule '{self.name}' is used, the only one that keeps the memory: {others}"
        won = found[self.name]
        others = ", ".join(
            f"{one.time / won.time:.2f}× as fast as '{one.name}'"
            for one in sorted(self.outcomes, key=lambda one: one.time)
            if one is not won
        )
        text = (
            f"schedule '{self.name}' is used: {time_text(won.time)} a step, predicted"
            f" {time_text(won.predicted)}; {others}"
        )
        left = {name: why for name, why in self.reasons.items() if name not in found and why}
        return "; ".join([text, *(f"'{name}' was not tried: {why}" for name, why in left.items())])
