"""Options that change what a run computes, so that they are offered and not taken."""

from __future__ import annotations

from dataclasses import dataclass

LEAST = 0.01
"""Share of a step below which an option is not worth what it changes."""


@dataclass(frozen=True)
class Offer:
    """What an option of the user's would bring.

    Attributes:
        option: as users spell it, such as `fp8_all_gather=True`.
        seconds: predicted of a step with it, under a plan that is chosen for it.
        before: predicted of a step without it.
        changes: what it changes.
        source: where times come from, if not from where all others beside it do.
    """

    option: str
    seconds: float
    before: float
    changes: str
    source: str = ""

    @property
    def gain(self) -> float:
        """Share of a step that it saves; below 0 where steps take longer with it."""
        return 1 - self.seconds / self.before

    def __str__(self) -> str:
        if self.gain < LEAST:
            return f"with {self.option} steps would be no shorter ({-self.gain:+.1%}): leave it out"
        source = f", {self.source}" if self.source else ""
        return (
            f"with {self.option} a step is predicted to take {self.gain:.1%} less{source}: give it,"
            f" if you will; {self.changes}"
        )
