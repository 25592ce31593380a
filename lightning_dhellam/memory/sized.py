"""Lanes on which nothing computes: what is launched says how large its results are.

The engine walks its plans on them as it does on a device, so that what is live at any moment of a
step is what the engine itself would hold, views of one storage counted once. Each operator runs
once on tensors that have a shape and no memory (torch's fake tensors), and is known from then on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from lightning_dhellam.engine.tape import Ledger, Slot, tensors
from lightning_dhellam.engine.tracks import TrackLanes
from lightning_dhellam.layers.host_memory import OnHost
from lightning_dhellam.parallel.collectives import Pending
from lightning_dhellam.plan import Lane, Operator, Track

_Storages = tuple[tuple[int, int], ...]
"""Number and bytes of each storage."""


class Sized(NamedTuple):
    """A value of which only the size is known.

    Attributes:
        like: what an operator has returned: tensors without memory, or anything else.
        storages: of the tensors in `like`, in their order.
    """

    like: Any
    storages: _Storages


class _Found(NamedTuple):
    """What an operator returns.

    Attributes:
        likes: its results.
        origins: where the storage of each tensor in each result comes from: of the tensors that it
            was given the number of one, or -1 - n for the n-th that it has made.
        made: bytes of what it has made.
    """

    likes: tuple[Any, ...]
    origins: tuple[tuple[int, ...], ...]
    made: tuple[int, ...]


class SizedLedger(Ledger):
    """Counts values of which only the size is known."""

    def storages(self, value: Any) -> _Storages:
        """Number and bytes of each storage."""
        return value.storages if isinstance(value, Sized) else ()


class SizedLanes(TrackLanes):
    """Nothing is computed, and lanes wait for each other as those of a device do.

    Attributes:
        allocated: what a device holds. The ledger counts a slot until its last reader was issued;
            its memory goes back when its lane has waited for that, and that of a send some walks
            later.
        buffers: of host memory in use, by their bytes.
        most_buffers: of each size at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ledger = SizedLedger()
        self.allocated = SizedLedger()
        self.buffers: Counter[int] = Counter()
        self.most_buffers: Counter[int] = Counter()
        self._known: dict[tuple[Any, ...], _Found] = {}
        self._kinds: dict[int, tuple[Operator, Hashable]] = {}
        self._storage_numbers = count(1)

    def _run(self, operator: Operator, values: Sequence[Any], first: bool) -> Any:
        likes = [value.like if isinstance(value, Sized) else value for value in values]
        given = [
            pair for value, like in zip(values, likes, strict=True) for pair in _of(value, like)
        ]
        key = (self._kind(operator), *map(_form, likes))
        if key not in self._known:
            self._known[key] = _found(operator, likes)
        found = self._known[key]
        fresh = [(next(self._storage_numbers), size) for size in found.made]
        results = tuple(
            Sized(like, tuple(given[n] if n >= 0 else fresh[-1 - n] for n in numbers))
            for like, numbers in zip(found.likes, found.origins, strict=True)
        )
        return results if len(operator.writes) != 1 else results[0]

    def _look(self, operator: Operator, inputs: Sequence[Slot]) -> Any:
        return self._run(operator, [slot.value for slot in inputs], first=False)

    def _record(self, track: Track) -> Any:
        return True

    def _follow(self, track: Track, done: Any) -> None:
        """Nothing to wait for."""

    def _kind(self, operator: Operator) -> Hashable:
        """What operators of layers of one shape have in common: their results are as large."""
        known = self._kinds.get(id(operator))
        if known is None:
            trained = tuple(tuple(p.shape) for p in operator.accumulates)
            says = (operator.reads, operator.writes, operator.cost, operator.growth, trained)
            known = self._kinds[id(operator)] = operator, (operator.name, *says)
        return known[1]

    def share(self, spare: bool) -> None:
        """Nothing to share."""

    @contextmanager
    def on(self, lane: Lane) -> Iterator[None]:
        yield

    def born(self, slot: Slot) -> None:
        """Note that `slot` is live, and was allocated."""
        super().born(slot)
        self.allocated.add(slot)
        self.buffers.update(_buffers(slot.value))
        self.most_buffers |= self.buffers

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that a step takes for slots."""
        return sum(size * count for size, count in self.most_buffers.items())

    def hand_out(self, slot: Slot) -> Any:
        """The value of a slot that leaves the engine, of which the shape is known."""
        self.allocated.remove(slot)
        value = super().hand_out(slot)
        return value.like if isinstance(value, Sized) else value

    def _drop(self, slot: Slot) -> None:
        self.allocated.remove(slot)
        self.buffers.subtract(_buffers(slot.value))
        super()._drop(slot)


def _buffers(value: Any) -> tuple[int, ...]:
    like = value.like if isinstance(value, Sized) else None
    return like.sizes if isinstance(like, OnHost) else ()


def _found(operator: Operator, likes: Sequence[Any]) -> _Found:
    """Run an operator on tensors without memory.

    What is rehearsed by made-up values is so here: it then has values, and so has what follows of
    them alone, until the host has read them.
    """
    run, has_values = operator.run, _have_values(likes)
    if operator.rehearsals:
        run = operator.rehearsals[0]
        if operator.computes:
            likes, has_values = [_with_memory(like) for like in likes], True
    with unset_fake_temporarily() if has_values else nullcontext():
        result = run(*likes)
    result = result.value if isinstance(result, Pending) else result
    count = len(operator.writes)
    results = (result,) if count == 1 else tuple(result or ())
    places = {_place(tensor): n for n, tensor in reversed([*enumerate(tensors(tuple(likes)))])}
    made: list[int] = []
    origins = []
    for one in results:
        numbers = []
        for tensor in tensors(one):
            place = _place(tensor)
            if place not in places:
                places[place] = -1 - len(made)
                made.append(tensor.untyped_storage().nbytes())
            numbers.append(places[place])
        origins.append(tuple(numbers))
    return _Found(results, tuple(origins), tuple(made))


def _have_values(likes: Sequence[Any]) -> bool:
    every = tensors(tuple(likes))
    return bool(every) and not any(isinstance(tensor, FakeTensor) for tensor in every)


def _with_memory(like: Any) -> Any:
    """A tensor of the same shape, of which nothing is read: the system gives it no page."""
    if not isinstance(like, FakeTensor):
        return like
    with unset_fake_temporarily():
        return torch.empty(like.shape, dtype=like.dtype)


def _place(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _of(value: Any, like: Any) -> _Storages:
    """Number and bytes of the storages of a value, also of one that no operator has made."""
    if isinstance(value, Sized):
        return value.storages
    return tuple((-_place(t), t.untyped_storage().nbytes()) for t in tensors(like))


def _form(like: Any) -> Any:
    if isinstance(like, Tensor):
        return tuple(like.shape), like.dtype
    if isinstance(like, tuple):
        return tuple(map(_form, like))
    if isinstance(like, OnHost):
        return like.form
    return type(like)
