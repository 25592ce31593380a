"""Batches of a loader for as long as every rank's loader has some."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

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
    """Is never ahead of the batches it has given, for a loader whose place is saved."""

    def __init__(self, loader: Any, length: int | None, ask: Ask | None) -> None:
        super().__init__(loader, length, ask)
        self._ahead = False

    def state_dict(self) -> Any:
        """The place of the loader."""
        return self.loader.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Go on at a place."""
        self.loader.load_state_dict(state)
