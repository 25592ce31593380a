"""Which plan the next step tries, and what the steps so far have shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class Trials:
    """Tries candidates on real steps, one candidate at a time, in rounds.

    Every round starts with another candidate, so that a drift of the machine's speed meets all
    alike. The first round counts nothing: memory is allocated and kernels are chosen then.

    Args:
        candidates: names of the plans that are tried.
        rounds: how many rounds count.
    """

    candidates: Sequence[str]
    rounds: int
    _timers: dict[str, list[Callable[[], float]]] = field(init=False)
    _done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._timers = {name: [] for name in self.candidates}

    @property
    def total(self) -> int:
        """How many steps all rounds take."""
        return (self.rounds + 1) * len(self.candidates)

    @property
    def left(self) -> int:
        """How many steps are still to come."""
        return self.total - self._done

    @property
    def counted(self) -> int:
        """How many whole rounds count so far."""
        return max(0, self._done // len(self.candidates) - 1)

    def next(self) -> str:
        """Return the candidate of the next step."""
        count = len(self.candidates)
        turn, place = divmod(self._done, count)
        return self.candidates[(turn + place) % count]

    def add(self, timer: Callable[[], float]) -> None:
        """Note a step of the candidate that was `next`; `timer` tells its seconds when asked."""
        if self._done >= len(self.candidates):
            self._timers[self.next()].append(timer)
        self._done += 1

    def table(self) -> list[list[float]]:
        """Return the seconds of the steps of whole rounds, a row for each candidate."""
        return [
            [timer() for timer in self._timers[name][: self.counted]] for name in self.candidates
        ]
