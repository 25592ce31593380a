"""Slots of one micro-batch in one layer, and when they are freed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_dhellam.plan import BATCH_PREFIX, Track


class Mark(NamedTuple):
    """A point on a track: the end of one operator.

    Attributes:
        track: on which the operator ran.
        number: how many operators the track had run then.
        done: a CUDA event, a gloo work, or None where nobody has to wait.
        seen: what the track knew of the other tracks then (CUDA).
    """

    track: Track
    number: int
    done: Any
    seen: dict[Track, int] | None


@dataclass(slots=True)
class Memory:
    """What the slots that share a storage have in common.

    Attributes:
        owner: the track that allocated it, and to which it goes back.
        uses: last number of each other track on which one of the slots was read.
    """

    owner: Track
    uses: dict[Track, int] = field(default_factory=dict)


@dataclass(slots=True)
class Slot:
    """A value, where it was made, and who still needs it.

    Attributes:
        value: a tensor, or anything else that an operator writes.
        mark: the end of the operator that writes it.
        holders: tapes that hold it: two while one layer hands it to the next.
        memory: what that operator allocated for it, on its own track.
        borrowed: by storage, the memory of older slots of which the value has views.
        memories: all that the value uses: its own and what it borrows.
        storages: where the storage of each tensor begins, and its bytes, while the slot is live.
    """

    value: Any
    mark: Mark
    holders: int = 0
    memory: Memory = field(init=False)
    borrowed: dict[int, Memory] = field(default_factory=dict)
    memories: tuple[Memory, ...] = field(init=False)
    storages: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        self.memory = Memory(self.mark.track)
        self.memories = (self.memory,)

    def borrow(self, place: int, memory: Memory) -> None:
        """Note that the value has views of `memory`, whose storage is at `place`."""
        self.borrowed[place] = memory
        self.memories = (self.memory, *self.borrowed.values())


@dataclass
class Ledger:
    """Counts the slots and bytes that are live, by storage: views share theirs."""

    slots: int = 0
    bytes: int = 0
    peak_slots: int = 0
    peak_bytes: int = 0
    _storages: dict[int, tuple[int, Memory]] = field(default_factory=dict)

    def add(self, slot: Slot) -> None:
        """A slot came to life. It borrows the memory of live slots that it has views of."""
        self.slots += 1
        slot.storages = self.storages(slot.value)
        for place, size in slot.storages:
            holders, memory = self._storages.get(place, (0, slot.memory))
            self._storages[place] = holders + 1, memory
            if not holders:
                self.bytes += size
            elif memory is not slot.memory:
                slot.borrow(place, memory)
        if self.slots > self.peak_slots:
            self.peak_slots = self.slots
        if self.bytes > self.peak_bytes:
            self.peak_bytes = self.bytes

    def remove(self, slot: Slot) -> None:
        """A slot lost its last reader."""
        self.slots -= 1
        for place, size in slot.storages:
            holders, memory = self._storages[place]
            if holders > 1:
                self._storages[place] = holders - 1, memory
            else:
                del self._storages[place]
                self.bytes -= size

    def storages(self, value: Any) -> tuple[tuple[int, int], ...]:
        """Where the storages of the tensors in `value` begin, and their bytes."""
        found = []
        for tensor in tensors(value):
            storage = tensor.untyped_storage()
            found.append((storage.data_ptr(), storage.nbytes()))
        return tuple(found)

    def shared(self, tensor: Tensor) -> bool:
        """Whether a live slot uses the storage of `tensor`."""
        return tensor.untyped_storage().data_ptr() in self._storages


def tensors(value: Any) -> tuple[Tensor, ...]:
    """The tensors with at least one dimension in a slot's value."""
    if isinstance(value, torch.Tensor):
        return (value,) if value.dim() else ()
    if isinstance(value, tuple):
        return tuple(tensor for item in value for tensor in tensors(item))
    return ()


class Tape:
    """The slots of one micro-batch in one layer.

    Args:
        readers: how many readers each slot has, over both directions.
        batch: the tape of the micro-batch itself, with its tokens and labels.
        step: slots of the layer that all micro-batches of the step read.
    """

    __slots__ = ("_batch", "_left", "_slots", "_step")

    def __init__(
        self,
        readers: Counter[str],
        batch: Tape | None = None,
        step: Mapping[str, Slot] | None = None,
    ) -> None:
        self._left = Counter(readers)
        self._slots: dict[str, Slot] = {}
        self._batch = batch
        self._step = step or {}

    def __getitem__(self, name: str) -> Slot:
        if self._batch is not None and name.startswith(BATCH_PREFIX):
            return self._batch[name]
        if name in self._step:
            return self._step[name]
        return self._slots[name]

    def slots(self, names: tuple[str, ...]) -> list[Slot]:
        """The slots of these names."""
        own = self._slots
        return [own.get(name) or self[name] for name in names]

    def names(self) -> tuple[str, ...]:
        """Names of the live slots."""
        return tuple(self._slots)

    def put(self, name: str, slot: Slot) -> bool:
        """Hold `slot` under `name`. Returns whether anybody will read it."""
        if not self._left[name]:
            return False
        self._slots[name] = slot
        slot.holders += 1
        return True

    def read(self, name: str) -> Slot | None:
        """Count one reader off. Returns the slot when that was the last of its last holder.

        Slots of the micro-batch itself are not counted.
        """
        left = self._left[name] - 1
        assert left >= 0, f"slot {name} has more readers than its graphs say"
        self._left[name] = left
        if left:
            return None
        slot = self._slots.pop(name)
        slot.holders -= 1
        return None if slot.holders else slot

    def take(self, names: tuple[str, ...]) -> list[Slot]:
        """Count the next graph off as a reader, and return the slots for it."""
        slots = []
        for name in names:
            slot = self._slots[name]
            self._left[name] -= 1
            if not self._left[name]:
                del self._slots[name]
                slot.holders -= 1
            slots.append(slot)
        return slots
