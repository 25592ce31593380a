"""Which plan the next step tries, and what the steps so far have shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

from lightning_dhellam.search.measure.profile import Samples
from lightning_dhellam.search.report.outcomes import Outcome


@dataclass
class Trials:
    """Real steps, one candidate at a time, in rounds.

    Every round starts with another candidate, so that a drift of the machine's speed meets all
    alike. The first round counts nothing: memory is allocated and kernels are chosen then.

    Args:
        candidates: names of the plans.
        rounds: that count.
    """

    candidates: Sequence[str]
    rounds: int
    _clocks: dict[str, list[Callable[[], float]]] = field(init=False)
    _done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._clocks = {name: [] for name in self.candidates}

    @property
    def total(self) -> int:
        """Steps of all rounds."""
        return (self.rounds + 1) * len(self.candidates)

    @property
    def left(self) -> int:
        """Steps still to come."""
        return self.total - self._done

    @property
    def counted(self) -> int:
        """Whole rounds that count so far."""
        return max(0, self._done // len(self.candidates) - 1)

    def next(self) -> str:
        """The candidate of the next step."""
        count = len(self.candidates)
        turn, place = divmod(self._done, count)
        return self.candidates[(turn + place) % count]

    def add(self, clock: Callable[[], float]) -> None:
        """The step of the candidate that was `next` took what `clock` says when it is asked."""
        if self._done >= len(self.candidates):
            self._clocks[self.next()].append(clock)
        self._done += 1

    def table(self) -> list[list[float]]:
        """Seconds of the whole rounds, a row for each candidate."""
        return [
            [clock() for clock in self._clocks[name][: self.counted]] for name in self.candidates
        ]


def measured(outcomes: Sequence[Outcome], table: Sequence[Sequence[float]]) -> list[Outcome]:
    """Outcomes with the times of `table`, a row for each: medians, and half the spread."""
    found = []
    for outcome, row in zip(outcomes, table, strict=True):
        samples = Samples(tuple(row))
        spread = (samples.quantile(0.8) - samples.quantile(0.2)) / 2
        found.append(replace(outcome, measured=median(row), spread=spread))
    return found
