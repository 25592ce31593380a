"""Several sets of samples as one, by their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
from megatron.core.datasets import helpers
from torch.utils.data import ConcatDataset, Dataset

from lightning_dhellam.data.loader import Passes, SampleOrder

_FIRST = 2**12
"""Places that are worked out at once, at least."""


def check_weights(weights: Mapping[str, float]) -> dict[str, float]:
    """The weights of data sets by their paths, normalised to a sum of 1.

    Raises:
        ValueError: there is no set, or a weight is not above 0.
    """
    if not weights:
        raise ValueError("path={} has no data set: give at least one, with its weight")
    for path, weight in weights.items():
        if not 0 < weight < float("inf"):
            raise ValueError(
                f"path={{{path}: {weight}}}: the weight of a data set is a number above 0, of which"
                " only its share of all matters; leave a set out that is not to be used"
            )
    total = sum(weights.values())
    return {path: weight / total for path, weight in weights.items()}


class BlendedOrder(SampleOrder):
    """An order in which each set has its share, up to any place of it.

    The set of each place is the one that lacks the most up to there (Megatron's blending). Within a
    set samples follow each other as in a `SampleOrder` of it alone, pass by pass: a set that is
    through begins again, shuffled anew.

    Args:
        sets: of samples.
        weights: of the sets, with a sum of 1.
        batch_size, seed, replicas, rank, epoch_samples: see `SampleOrder`.
    """

    def __init__(
        self, sets: Sequence[Any], weights: Sequence[float], *args: Any, **options: Any
    ) -> None:
        joined: ConcatDataset[Any] = ConcatDataset([*sets])
        super().__init__(joined, *args, **options)
        self._weights = numpy.array(weights, dtype=numpy.float64)
        self._begins = [0, *joined.cumulative_sizes]
        self._own = [Passes(len(one), self.seed) for one in sets]
        self._set = numpy.empty(0, numpy.int16)
        self._number = numpy.empty(0, numpy.int64)

    def sample(self, number: int) -> int:
        """See `SampleOrder`."""
        if number >= len(self._set):
            self._work_out(number + 1)
        which = int(self._set[number])
        return self._begins[which] + self._own[which].sample(int(self._number[number]))

    def passes(self, samples: int) -> list[float]:
        """How often the first `samples` places go through each set."""
        self.sample(max(0, samples - 1))
        counts = numpy.bincount(self._set[:samples], minlength=len(self._own))
        return [count / len(one) for count, one in zip(counts.tolist(), self._own, strict=True)]

    def _work_out(self, places: int) -> None:
        # The choices at the first places are the same however many there are.
        size = max(_FIRST, 2 * len(self._set), places)
        self._set = numpy.zeros(size, numpy.int16)
        self._number = numpy.zeros(size, numpy.int64)
        helpers.build_blending_indices(
            self._set, self._number, self._weights, len(self._weights), size, False
        )


def joined(sets: Sequence[Dataset[Any]]) -> Dataset[Any]:
    """All samples of several sets, one behind the other; of one set itself."""
    return sets[0] if len(sets) == 1 else ConcatDataset([*sets])


def as_weights(path: str | Path | Mapping[str, float]) -> dict[str, float]:
    """Paths with their weights; one path alone has all of it."""
    return check_weights(path) if isinstance(path, Mapping) else {str(path): 1.0}
