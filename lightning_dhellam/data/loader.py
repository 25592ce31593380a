"""A DataLoader that can go on in the middle of an epoch."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Generic, TypeVar

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Sampler

Batch = TypeVar("Batch")


class SkippingBatchSampler(BatchSampler):
    """A BatchSampler that keeps the dataset's order and can leave out the first batches.

    Its next walk leaves out `skip` of them, without reading them.
    """

    skip: int = 0

    def __init__(self, sampler: Sampler[int], batch_size: int, drop_last: bool) -> None:
        super().__init__(sampler, batch_size, drop_last)
        if isinstance(sampler, DistributedSampler):
            # Lightning asks for a shuffle of all training data; ours is shuffled already, and
            # the order must not depend on the number of ranks.
            sampler.shuffle = False

    def __iter__(self) -> Iterator[list[int]]:
        skip, self.skip = self.skip, 0
        yield from islice(super().__iter__(), skip, None)


class ResumableDataLoader(DataLoader[Batch], Generic[Batch]):
    """A DataLoader whose position is part of Lightning's checkpoint.

    Needs `batch_sampler` to be a SkippingBatchSampler. Lightning puts the data-parallel sampler
    into it, and calls `state_dict` and `load_state_dict`. `epoch_batches` says after how many
    batches the trainer starts the next epoch (it may be told to stop before the last batch).
    """

    def __init__(
        self, *args: Any, epoch_batches: Callable[[], int | float] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.epoch_batches = epoch_batches
        self._drawn = 0
        self._skip = 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator: an iterator that is made but never advanced must not use up the skip.
        self._drawn, self._skip = self._skip, 0
        assert isinstance(self.batch_sampler, SkippingBatchSampler)
        self.batch_sampler.skip = self._drawn
        for batch in super().__iter__():
            self._drawn += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """How many batches of the epoch were handed out; 0 at its end."""
        end = len(self)
        if self.epoch_batches is not None:
            end = int(min(end, self.epoch_batches()))
        return {"batches": self._drawn if self._drawn < end else 0}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._drawn = self._skip = state["batches"]
