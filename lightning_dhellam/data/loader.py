"""Training samples in one global order, of which every rank takes its share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import Any, Generic, TypeVar, cast

import numpy
from torch.utils.data import DataLoader, Dataset, DistributedSampler

Batch = TypeVar("Batch")


class Passes:
    """The numbers of some samples, again and again: first in their order, then shuffled anew.

    Args:
        samples: how many there are.
        seed: of the shuffles, with the number of the pass.
    """

    def __init__(self, samples: int, seed: int) -> None:
        self._samples = samples
        self._seed = seed
        self._shuffled: tuple[int, numpy.ndarray] = (0, numpy.empty(0))

    def __len__(self) -> int:
        return self._samples

    def sample(self, number: int) -> int:
        """Which sample is at a place."""
        turn, place = divmod(number, self._samples)
        if turn == 0:
            return place
        if self._shuffled[0] != turn:
            # RandomState's numbers are promised to stay the same in every version of numpy.
            order = numpy.arange(self._samples, dtype=numpy.min_scalar_type(self._samples))
            numpy.random.RandomState([self._seed % 2**32, turn]).shuffle(order)
            self._shuffled = (turn, order)
        return int(self._shuffled[1][place])


class SampleOrder(DistributedSampler[int]):
    """The samples that one data-parallel rank trains on, of an order that all ranks share.

    The order has no end. It goes through the dataset again and again: the first pass in the
    dataset's own order, each further one shuffled by `seed` and its number. An epoch takes the
    next `epoch_samples` of it, as far as they make whole batches on every rank, and the epoch
    after that begins where this one ended. So no sample is left out or comes early, and where
    training is in the order is one number.

    It is a DistributedSampler so that Lightning, which would put one of its own here, lets it be.

    Args:
        dataset: whose samples are numbered.
        batch_size: samples of one rank in one batch.
        seed: of the shuffles.
        replicas: data-parallel ranks that share the samples of a batch.
        rank: of this process among them.
        epoch_samples: samples of an epoch, over all ranks; None for as many as the dataset has.

    Attributes:
        position: samples of the order that all ranks together have been given.
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        seed: int = 0,
        *,
        replicas: int = 1,
        rank: int = 0,
        epoch_samples: int | None = None,
    ) -> None:
        super().__init__(
            cast(Dataset[Any], dataset), replicas, rank, shuffle=False, seed=seed, drop_last=True
        )
        self.batch_size = batch_size
        self.epoch_samples = len(dataset) if epoch_samples is None else epoch_samples
        self.position = 0
        self._passes = Passes(len(dataset), seed)

    @property
    def step_samples(self) -> int:
        """Samples that all ranks together are given in one batch."""
        return self.batch_size * self.num_replicas

    def __len__(self) -> int:
        return self.epoch_samples // self.step_samples * self.batch_size

    def __iter__(self) -> Iterator[int]:
        first = self.position + self.rank
        numbers = range(first, first + len(self) * self.num_replicas, self.num_replicas)
        return (self.sample(number) for number in numbers)

    def sample(self, number: int) -> int:
        """The index in the dataset of the sample at a place in the order."""
        return self._passes.sample(number)


class ResumableDataLoader(DataLoader[Batch], Generic[Batch]):
    """A DataLoader over a SampleOrder, whose place in it is part of checkpoints.

    With another sampler, such as the one that Lightning puts in to overfit a few batches, it is a
    DataLoader like any other.
    """

    def __init__(self, dataset: Dataset[Any], sampler: Any = None, **options: Any) -> None:
        if isinstance(sampler, SampleOrder):
            options |= {"batch_size": sampler.batch_size, "drop_last": True}
        super().__init__(dataset, sampler=sampler, **options)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator: an iterator that is made but never advanced must not change the place.
        for batch in super().__iter__():
            if isinstance(self.sampler, SampleOrder):
                self.sampler.position += self.sampler.step_samples
            yield batch

    def state_dict(self) -> dict[str, int]:
        """How many samples of the order all ranks together were given."""
        return {"samples": self.sampler.position} if isinstance(self.sampler, SampleOrder) else {}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where `state` was taken, with any batch size and number of ranks."""
        if isinstance(self.sampler, SampleOrder):
            self.sampler.position = position_in(state, self.sampler.step_samples)


def position_in(state: Mapping[str, Any], step_samples: int) -> int:
    """The place in the order that a saved state names.

    States of version 0.1 hold a number of batches, which were of `step_samples` samples.
    """
    if "batches" in state:
        return int(state["batches"]) * step_samples
    return int(state.get("samples", 0))
