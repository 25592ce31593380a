"""The rows of a profile: samples of a measurement, and what is kept of them."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

Key = str
"""Names a measured operator: `layer/operator` of the first operator that does this work."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Repeated measurements of one thing, in seconds."""

    seconds: tuple[float, ...]

    def quantile(self, share: float) -> float:
        """Return the seconds that a `share` (0 to 1) of the samples do not exceed, interpolated."""
        ordered = sorted(self.seconds)
        position = share * (len(ordered) - 1)
        below = int(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (position - below) * (ordered[above] - ordered[below])


@dataclass(frozen=True, slots=True)
class Timing:
    """The time of one operator, alone or beside another: one row of a profile.

    Attributes:
        operator: key of the operator that was timed.
        partner: key of the operator that ran beside it, None when it ran alone.
        median: seconds from this operator's own start to its end.
        p20: seconds that a fifth of the samples do not exceed.
        p80: seconds that four fifths of the samples do not exceed.
        lead: seconds that the compute operator of the two had run when the communication was
            started; 0 when communication went first, or when both communicate.
    """

    operator: Key
    partner: Key | None
    median: float
    p20: float
    p80: float
    lead: float = 0.0

    @classmethod
    def of(cls, operator: Key, partner: Key | None, samples: Samples, lead: float = 0.0) -> Timing:
        """Summarise the samples of an operator.

        Raises:
            ValueError: there are no samples, or one is not positive and finite.
        """
        beside = f" beside '{partner}'" if partner else ""
        if not samples.seconds:
            raise ValueError(f"'{operator}'{beside} has no samples: measure it at least once")
        if not all(0 < value < float("inf") for value in samples.seconds):
            raise ValueError(
                f"'{operator}'{beside} was timed at {min(samples.seconds)} s: times must be"
                " positive and finite; check the timer of the measurement"
            )
        spread = samples.quantile(0.2), samples.quantile(0.8)
        return cls(operator, partner, median(samples.seconds), *spread, lead)
