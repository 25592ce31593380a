"""Lanes: where operators run, how they wait for each other, and when memory may be used again.

The only place that knows streams, events and works.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lightning_dhellam.engine.tape import Ledger, Mark, Slot, tensors
from lightning_dhellam.parallel.collectives import Pending
from lightning_dhellam.plan import Lane, Operator


class Lanes(ABC):
    """One device's lanes.

    Args:
        poison: overwrite floating-point memory with NaN when it is freed, to expose an operator
            that reads too late. For tests.
    """

    def __init__(self, *, poison: bool = False) -> None:
        self.ledger = Ledger()
        self.poison = poison

    @abstractmethod
    def launch(
        self, operator: Operator, inputs: Sequence[Slot], crosses: bool, first: bool = False
    ) -> tuple[Any, Mark]:
        """Start `operator` after what its inputs wait for.

        `crosses` says whether another lane will read what it writes; `first`, that it shall begin
        before what `compute` is given next. Returns what the operator returned, and the mark of
        its end.
        """

    @abstractmethod
    def barrier(self) -> None:
        """Every lane waits for every other lane."""

    @abstractmethod
    def constants(self, values: Mapping[str, Any]) -> dict[str, Slot]:
        """Slots for values that are ready now. The ledger does not count them."""

    @abstractmethod
    @contextmanager
    def on(self, lane: Lane) -> Iterator[None]:
        """Run the body on `lane`, after everything that `compute` was given so far."""

    def born(self, slot: Slot) -> None:
        """Note that `slot` is live."""
        self.ledger.add(slot)

    def release(self, slot: Slot) -> None:
        """Free `slot`, which has had its last reader, as soon as its memory is not in use."""
        self.ledger.remove(slot)
        self._free(slot)

    def hand_out(self, slot: Slot) -> Any:
        """The value of a slot that leaves the engine: its memory is the caller's."""
        self.ledger.remove(slot)
        return slot.value

    @abstractmethod
    def _free(self, slot: Slot) -> None:
        """Let go of the memory when no lane uses it any more."""

    def _drop(self, slot: Slot) -> None:
        if self.poison:
            for tensor in tensors(slot.value):
                if tensor.is_floating_point() and not self.ledger.shared(tensor):
                    tensor.fill_(torch.nan)
        slot.value = None


class CpuLanes(Lanes):
    """Compute runs inline; communication is asynchronous work that its first reader waits for."""

    def __init__(self, *, poison: bool = False) -> None:
        super().__init__(poison=poison)
        self._running: list[Any] = []

    def launch(
        self, operator: Operator, inputs: Sequence[Slot], crosses: bool, first: bool = False
    ) -> tuple[Any, Mark]:
        for slot in inputs:
            if slot.mark.done is not None:
                slot.mark.done.wait()
        result = operator.run(*(slot.value for slot in inputs))
        if not isinstance(result, Pending):
            return result, Mark(operator.lane, 0, None, None)
        if result.work is None:
            return result.value, Mark(operator.lane, 0, None, None)
        self._running = [work for work in self._running if not work.is_completed()]
        self._running.append(result.work)
        for slot in inputs:
            slot.uses[operator.lane] = 0
        return result.value, Mark(operator.lane, 0, result.work, None)

    def barrier(self) -> None:
        for work in self._running:
            work.wait()
        self._running.clear()

    def constants(self, values: Mapping[str, Any]) -> dict[str, Slot]:
        mark = Mark(Lane.COMPUTE, 0, None, None)
        return {name: Slot(value, mark) for name, value in values.items()}

    @contextmanager
    def on(self, lane: Lane) -> Iterator[None]:
        yield

    def _free(self, slot: Slot) -> None:
        if self.poison and slot.uses:
            return  # a running work may still read it; it holds its own reference
        self._drop(slot)


class CudaLanes(Lanes):
    """Each lane is a stream; compute is the stream that is current when the lanes are made.

    A slot's memory belongs to the lane that made it, as the caching allocator sees it. When the
    slot has had its last reader, its memory goes back only once that lane has waited for every
    other lane that read it. Lanes wait for each other all the time, so this costs no extra
    synchronisation, only a little delay; vector clocks tell when it is so:

        compute   GEMM  ---->  writes x      next gather waits for compute: x is freed here
        tp              gather reads x -->

    Args:
        device: a CUDA device.
        poison: see `Lanes`.
        priority: of communication streams: -1 goes before compute, 0 is its equal.
    """

    def __init__(self, device: torch.device, *, poison: bool = False, priority: int = -1) -> None:
        super().__init__(poison=poison)
        self.device = device
        self._priority = priority
        self._streams = {Lane.COMPUTE: torch.cuda.current_stream(device)}
        self._numbers: dict[Lane, int] = {Lane.COMPUTE: 0}
        self._seen: dict[Lane, dict[Lane, int]] = {Lane.COMPUTE: {}}
        self._waiting: dict[Lane, list[Slot]] = {Lane.COMPUTE: []}

    def stream(self, lane: Lane) -> torch.cuda.Stream:
        """The stream of `lane`, made on first use."""
        if lane not in self._streams:
            self._streams[lane] = torch.cuda.Stream(self.device, priority=self._priority)
            self._numbers[lane] = 0
            self._seen[lane] = {}
            self._waiting[lane] = []
        return self._streams[lane]

    def launch(
        self, operator: Operator, inputs: Sequence[Slot], crosses: bool, first: bool = False
    ) -> tuple[Any, Mark]:
        lane = operator.lane
        stream = self.stream(lane)
        for slot in inputs:
            self._wait(lane, stream, slot.mark)
        if first:
            begins = torch.cuda.Event()
            begins.record(stream)
            self._streams[Lane.COMPUTE].wait_event(begins)
        values = (slot.value for slot in inputs)
        if lane is Lane.COMPUTE:
            result = operator.run(*values)
        else:
            with torch.cuda.stream(stream):
                result = operator.run(*values)
        number = self._numbers[lane] = self._numbers[lane] + 1
        for slot in inputs:
            if slot.mark.lane is not lane:
                slot.uses[lane] = number
        mark = self._mark(lane, stream) if crosses else Mark(lane, number, None, None)
        return (result.value if isinstance(result, Pending) else result), mark

    def barrier(self) -> None:
        marks = [self._mark(lane, stream) for lane, stream in self._streams.items()]
        for lane, stream in self._streams.items():
            for mark in marks:
                self._wait(lane, stream, mark)

    def constants(self, values: Mapping[str, Any]) -> dict[str, Slot]:
        self._numbers[Lane.COMPUTE] += 1
        mark = self._mark(Lane.COMPUTE, self._streams[Lane.COMPUTE])
        return {name: Slot(value, mark) for name, value in values.items()}

    @contextmanager
    def on(self, lane: Lane) -> Iterator[None]:
        stream = self.stream(lane)
        self._numbers[Lane.COMPUTE] += 1
        self._wait(lane, stream, self._mark(Lane.COMPUTE, self._streams[Lane.COMPUTE]))
        with torch.cuda.stream(stream):
            yield
        self._numbers[lane] += 1

    def _mark(self, lane: Lane, stream: torch.cuda.Stream) -> Mark:
        event = torch.cuda.Event()
        event.record(stream)
        return Mark(lane, self._numbers[lane], event, dict(self._seen[lane]))

    def _wait(self, lane: Lane, stream: torch.cuda.Stream, mark: Mark) -> None:
        seen = self._seen[lane]
        if mark.lane is lane or seen.get(mark.lane, -1) >= mark.number:
            return
        assert mark.done is not None, "a slot crosses lanes without an event"
        stream.wait_event(mark.done)
        for other, number in (mark.seen or {}).items():
            if other is not lane and seen.get(other, -1) < number:
                seen[other] = number
        seen[mark.lane] = mark.number
        if self._waiting[lane]:
            self._collect(lane)

    def _collect(self, lane: Lane) -> None:
        still = []
        for slot in self._waiting[lane]:
            if self._passed(slot):
                self._drop_on(slot)
            else:
                still.append(slot)
        self._waiting[lane] = still

    def _passed(self, slot: Slot) -> bool:
        seen = self._seen[slot.mark.lane]
        return all(seen.get(lane, -1) >= number for lane, number in slot.uses.items())

    def _free(self, slot: Slot) -> None:
        if self._passed(slot):
            self._drop_on(slot)
        else:
            self._waiting[slot.mark.lane].append(slot)

    def _drop_on(self, slot: Slot) -> None:
        if self.poison:
            with torch.cuda.stream(self._streams[slot.mark.lane]):
                self._drop(slot)
        else:
            slot.value = None


def make_lanes(device: torch.device, *, poison: bool = False, priority: int = -1) -> Lanes:
    """The lanes of `device`; see `CudaLanes`."""
    if device.type == "cuda":
        return CudaLanes(device, poison=poison, priority=priority)
    return CpuLanes(poison=poison)
