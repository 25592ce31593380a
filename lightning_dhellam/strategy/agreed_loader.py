"""Batches of a loader for as long as every rank's loader has some."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import islice
from typing import Any

from lightning.fabric.utilities.data import sized_len

Ask = Callable[[bool, int], Callable[[], bool]]
"""From whether this rank has one more batch, and how many it had, to what waits for the answer:
whether all ranks have."""

_NONE = object()


class AgreedLoader:
    """A loader that ends on all ranks after the same number of batches.

    Attributes of the loader are its own.

    Args:
        loader: any iterable of batches.
        length: the smallest number of batches that a rank's loader says it has; None if any of
            them does not say.
        ask: asks the other ranks before each batch, a batch ahead so that nobody waits; None where
            `length` is known to be right.
    """

    def __init__(self, loader: Any, length: int | None, ask: Ask | None) -> None:
        self.loader = loader
        self._length = length
        self._ask = ask
        self._ahead = True

    def __len__(self) -> int:
        if self._length is None:
            # What Lightning understands as unknown, as of any other loader.
            raise TypeError(f"{type(self.loader).__name__} has no length on some rank")
        return self._length

    def __getattr__(self, name: str) -> Any:
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator[Any]:
        if self._ask is None:
            yield from islice(self.loader, self._length)
            return
        batches, count = iter(self.loader), 0
        batch, all_have_one = self._fetch(batches, count)
        while all_have_one():
            count += 1
            if self._ahead:
                following = self._fetch(batches, count)
                yield batch
            else:
                yield batch
                following = self._fetch(batches, count)
            batch, all_have_one = following

    def _fetch(self, batches: Iterator[Any], count: int) -> tuple[Any, Callable[[], bool]]:
        assert self._ask is not None
        batch = next(batches, _NONE)
        return batch, self._ask(batch is not _NONE, count)


class StatefulAgreedLoader(AgreedLoader):
    """Is never ahead of the batches it has given, for a loader whose place is saved.

    Of one without a length Lightning holds a batch that no step has had yet, to know which is the
    last. Its place is that before this batch.
    """

    def __init__(self, loader: Any, length: int | None, ask: Ask | None) -> None:
        super().__init__(loader, length, ask)
        self._ahead = False
        self._before: Any = None

    def state_dict(self) -> Any:
        """The place of the loader."""
        return self.loader.state_dict() if self._before is None else self._before

    def load_state_dict(self, state: Any) -> None:
        """Go on at a place."""
        self._before = None
        self.loader.load_state_dict(state)

    def _fetch(self, batches: Iterator[Any], count: int) -> tuple[Any, Callable[[], bool]]:
        if self._length is None:
            self._before = deepcopy(self.loader.state_dict())
        return super()._fetch(batches, count)


def keeping_place(loader: Any) -> Any:
    """The loader of a process alone; one without a length that keeps its place, so that it does."""
    if sized_len(loader) is not None or not keeps_place(loader):
        return loader
    return StatefulAgreedLoader(loader, None, lambda has_one, count: lambda: has_one)


def keeps_place(loader: Any) -> bool:
    """Whether Lightning saves the place of a loader, and lets it go on there."""
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


class RepeatingLoader(AgreedLoader):
    """Gives its last batch again until the loaders of all ranks have ended: none loses a batch.

    Args:
        loader: any iterable of batches.
        length: the largest number of batches that a rank's loader says it has; None if any of them
            does not say.
        ask: asks the other ranks before each batch whether any of them has one.
        first: gives a rank without any batch the first one of another. All ranks call it at their
            first.

    Attributes:
        count: how many batches the loader itself had, once it has ended.
    """

    def __init__(
        self, loader: Any, length: int | None, ask: Ask, first: Callable[[Any], Any]
    ) -> None:
        super().__init__(loader, length, ask)
        self._first = first
        self.count: int | None = None

    def __iter__(self) -> Iterator[Any]:
        self.count = None
        batches, number = iter(self.loader), 0
        batch, goes_on = self._fetch(batches, number)
        last = None
        while goes_on():
            if number == 0:
                last = self._first(None if batch is _NONE else batch)
            if batch is _NONE:
                self.count = number if self.count is None else self.count
                # Lightning looks up the samples of each batch here.
                seen = getattr(getattr(self.loader, "batch_sampler", 0), "seen_batch_indices", None)
                if seen is not None:
                    seen.append([])
            else:
                last = batch
            yield last
            number += 1
            batch, goes_on = self._fetch(batches, number)
