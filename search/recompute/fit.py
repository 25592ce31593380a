"""One candidate for each layer: the least time that fits, by branch and bound.

Time adds up over layers. Bytes do at each moment, over the micro-batches that each layer has saved,
and the two layers that meet need more besides. A layer that comes later is saved for a part of the
time that an earlier one is, so of layers that are alike the earlier ones make more again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np

_NODES = 100_000
"""Choices that are looked at before the best so far is taken."""
_CLOSE = 1e-3
"""Share of the time by which a choice must be better to be looked for."""


class Row(NamedTuple):
    """A moment, by what limits it.

    Attributes:
        saved: micro-batches that each layer has saved.
        left: micro-batches that each layer has between the halves of its backward.
        ahead: number of the layer that goes forward, or None.
        behind: number of the layer that goes backward, or None.
        bytes: that the two need besides, by candidate of either.
    """

    saved: tuple[int, ...]
    left: tuple[int, ...]
    ahead: int | None
    behind: int | None
    bytes: np.ndarray


@dataclass
class Fit:
    """Looks for the candidates of layers.

    Args:
        seconds: of each layer, by candidate, in a step.
        bytes: that each layer saves of a micro-batch, by candidate; from the most to the fewest.
        left: that each layer leaves between the halves of its backward, by candidate.
        alike: for each layer a number that those which are alike share.
        rows: the moments.
        limit: bytes that there are.
    """

    seconds: Sequence[np.ndarray]
    bytes: Sequence[np.ndarray]
    left: Sequence[np.ndarray]
    alike: Sequence[int]
    rows: Sequence[Row]
    limit: float
    _best: tuple[int, ...] = ()
    _least: float = np.inf
    _nodes: int = 0
    _chosen: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._count = len(self.seconds)
        self._saved = np.array([row.saved for row in self.rows], float)
        self._left = np.array([row.left for row in self.rows], float)
        self._room = self.limit - np.array([row.bytes.min() for row in self.rows])
        # The moment at which most is saved bounds what is to come.
        whole = self._held((0,) * self._count) - self._room
        self._tight = int(whole.argmax())
        least, left = (np.array([own.min() for own in of]) for of in (self.bytes, self.left))
        self._rest = np.array(
            [
                self._saved[:, at:] @ least[at:] + self._left[:, at:] @ left[at:]
                for at in range(self._count + 1)
            ]
        )
        self._bounds = [self._bound_from(at) for at in range(self._count + 1)]

    def peak(self, chosen: Sequence[int]) -> float:
        """Return the most bytes at once by these candidates."""
        besides = [
            row.bytes[
                0 if row.ahead is None else chosen[row.ahead],
                0 if row.behind is None else chosen[row.behind],
            ]
            for row in self.rows
        ]
        return float((self._held(chosen) + besides).max())

    def _held(self, chosen: Sequence[int]) -> np.ndarray:
        """Return the bytes that layers have saved or left at each moment."""
        saved, left = (
            np.array([own[one] for own, one in zip(of, chosen, strict=True)])
            for of in (self.bytes, self.left)
        )
        return np.asarray(self._saved @ saved + self._left @ left)

    def time(self, chosen: Sequence[int]) -> float:
        """Return the seconds of a step by these candidates."""
        return float(sum(own[one] for own, one in zip(self.seconds, chosen, strict=True)))

    def least(self) -> tuple[int, ...]:
        """Return the candidates of those that are tried by which fewest bytes are needed."""
        return min(self._simple(), key=self.peak)

    def run(self) -> tuple[int, ...]:
        """Return the best candidates found, one for each layer; nothing if none fit."""
        for chosen in self._simple():
            time = self.time(chosen)
            if time < self._least and self.peak(chosen) <= self.limit:
                self._best, self._least = chosen, time
        self._descend(0, 0.0, np.zeros(len(self.rows)))
        return self._best

    def _simple(self) -> list[tuple[int, ...]]:
        """Return choices of at most two candidates: one of the first layers, one of the others."""
        most = max(len(own) for own in self.seconds)
        found: dict[tuple[int, ...], None] = {}
        for one, other in product(range(most), repeat=2):
            for turn in range(self._count + 1) if one > other else (0,):
                numbers = [one if at < turn else other for at in range(self._count)]
                found[
                    tuple(min(n, len(o) - 1) for n, o in zip(numbers, self.seconds, strict=True))
                ] = None
        return list(found)

    def _descend(self, at: int, time: float, used: np.ndarray) -> None:
        self._nodes += 1
        room = self._room - used
        if self._nodes > _NODES or (self._rest[at] > room).any():
            return
        if time + self._bounds[at](room[self._tight]) >= self._least * (1 - _CLOSE):
            return
        if at == self._count:
            if self.peak(self._chosen) <= self.limit:
                self._best, self._least = tuple(self._chosen), time
            return
        before = max((i for i in range(at) if self.alike[i] == self.alike[at]), default=None)
        most = len(self.seconds[at]) if before is None else self._chosen[before] + 1
        for one in sorted(range(most), key=lambda n: self.seconds[at][n]):
            self._chosen.append(one)
            more = self._saved[:, at] * self.bytes[at][one] + self._left[:, at] * self.left[at][one]
            self._descend(at + 1, time + float(self.seconds[at][one]), used + more)
            self._chosen.pop()

    def _bound_from(self, at: int) -> Callable[[float], float]:
        """Return what bounds the time of all layers from `at` on, by the bytes that are left."""
        saved, left = self._saved[self._tight], self._left[self._tight]
        time = used = 0.0
        steps: list[tuple[float, float, float]] = []
        for layer in range(at, self._count):
            sizes = self.bytes[layer] * saved[layer] + self.left[layer] * left[layer]
            points = _hull(sizes, self.seconds[layer])
            time, used = time + points[0][1], used + points[0][0]
            steps += [((t - s) / (b - a), b - a, s - t) for (a, s), (b, t) in pairwise(points)]
        steps.sort()
        ends = np.cumsum([0.0, *(size for _, size, _ in steps)]) + used
        times = time - np.cumsum([0.0, *(gain for _, _, gain in steps)])
        return lambda room: float(np.interp(room, ends, times))


def _hull(sizes: np.ndarray, seconds: np.ndarray) -> list[tuple[float, float]]:
    """Return the lower convex hull of bytes and seconds, from the fewest bytes on."""
    points: list[tuple[float, float]] = []
    for size, time in sorted(zip(sizes.tolist(), seconds.tolist(), strict=True)):
        if points and time >= points[-1][1]:
            continue
        if points and size == points[-1][0]:
            points.pop()
        while len(points) > 1:
            (a, s), (b, t) = points[-2:]
            if (t - s) * (size - a) <= (time - s) * (b - a):
                break
            points.pop()
        points.append((size, time))
    return points
