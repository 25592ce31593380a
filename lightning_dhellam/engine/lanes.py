"""Lanes: where operators run, how they wait for each other, and when memory may be used again.

The only place that knows streams, events and works.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from lightning_dhellam.engine.tape import Ledger, Mark, Memory, Slot, tensors
from lightning_dhellam.kernels.linear.processors import leave
from lightning_dhellam.parallel.collectives import Pending
from lightning_dhellam.parallel.work import Work
from lightning_dhellam.plan import Lane, Operator, Track

_COMPUTE = Track(Lane.COMPUTE)
CYCLES = 1.7e9
"""Of a device in a second, about."""
_LEAD = 4e-6
"""Seconds by which communication that goes first is ahead of compute. Without, NCCL's kernels lose:
on two H200 (2026-11-25) a gather issued before a GEMM then takes 5.2 ms instead of 0.4, since the
GEMM has every multiprocessor; 2 µs are enough."""


class Lanes(ABC):
    """One device's lanes.

    Args:
        poison: overwrite floating-point memory with NaN when it is freed, to expose an operator
            that reads too late. For tests.

    Attributes:
        ledger: what is live.
        loads: whether the first launch of a kernel loads it, for which the device may have to
            finish all that it was given.
        processors: that a collective occupies, which GEMMs can leave free.
    """

    loads = False
    processors = 0

    def __init__(self, *, poison: bool = False) -> None:
        self.ledger = Ledger()
        self.poison = poison

    @abstractmethod
    def launch(
        self, operator: Operator, inputs: Sequence[Slot], crosses: bool, first: bool = False
    ) -> tuple[Any, Mark]:
        """Start `operator` after what its inputs wait for.

        `crosses` says whether another track will read what it writes; `first`, that it shall begin
        before what `compute` is given next. Returns what the operator returned, and the mark of
        its end.
        """

    @abstractmethod
    def share(self, spare: bool) -> None:
        """Whether a GEMM that is launched next leaves processors to communication."""

    @abstractmethod
    def barrier(self) -> None:
        """Every lane waits for every other lane, but not for transfers between stages.

        Those end when another stage has come as far, which may be waiting for this one.
        """

    @abstractmethod
    def drain(self) -> None:
        """Every lane waits for everything that was issued: the step is over."""

    @abstractmethod
    def settle(self, ahead: int) -> None:
        """A walk begins: take back memory that transfers of earlier walks have read.

        Nothing waits for a send, so its tensor would be held until the step is over. What was
        issued in the walks up to the one `ahead` walks before is waited for: long done, if no stage
        lags behind.
        """

    @abstractmethod
    def constants(self, values: Mapping[str, Any]) -> dict[str, Slot]:
        """Slots for values that are ready now, or are slots already. The ledger counts none."""

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
                    place = tensor.untyped_storage().data_ptr()
                    with self._owned_by(slot.borrowed.get(place, slot.memory).owner):
                        tensor.fill_(torch.nan)
        slot.value = None

    def _owned_by(self, track: Track) -> AbstractContextManager[Any]:
        """Where memory of `track` may be overwritten when it is freed."""
        return nullcontext()


class CpuLanes(Lanes):
    """Compute runs inline; communication is asynchronous work that its first reader waits for."""

    def __init__(self, *, poison: bool = False) -> None:
        super().__init__(poison=poison)
        self._running: list[Work] = []
        self._transfers: deque[list[Work]] = deque([[]])

    def launch(
        self, operator: Operator, inputs: Sequence[Slot], crosses: bool, first: bool = False
    ) -> tuple[Any, Mark]:
        for slot in inputs:
            if slot.mark.done is not None:
                slot.mark.done.wait()
        result = operator.run(*(slot.value for slot in inputs))
        if not isinstance(result, Pending):
            return result, Mark(operator.track, 0, None, None)
        if result.work is None:
            return result.value, Mark(operator.track, 0, None, None)
        self._note(operator.lane, result.work)
        for slot in inputs:
            for memory in slot.memories:
                memory.uses[operator.track] = 0
        return result.value, Mark(operator.track, 0, result.work, None)

    def _note(self, lane: Lane, work: Work) -> None:
        if lane is Lane.PP:
            self._transfers[-1].append(work)
        else:
            self._running = [other for other in self._running if not other.is_completed()]
            self._running.append(work)

    def share(self, spare: bool) -> None:
        """Nothing to share: communication runs on threads of its own."""

    def barrier(self) -> None:
        for work in self._running:
            work.wait()
        self._running.clear()

    def drain(self) -> None:
        self.barrier()
        self.settle(1)

    def settle(self, ahead: int) -> None:
        while len(self._transfers) >= ahead:
            for work in self._transfers.popleft():
                work.wait()
        self._transfers.append([])

    def constants(self, values: Mapping[str, Any]) -> dict[str, Slot]:
        mark = Mark(_COMPUTE, 0, None, None)
        return {name: _slot(value, mark) for name, value in values.items()}

    @contextmanager
    def on(self, lane: Lane) -> Iterator[None]:
        yield

    def _free(self, slot: Slot) -> None:
        if self.poison and any(memory.uses for memory in slot.memories):
            return  # a running work may still read it; it holds its own reference
        self._drop(slot)


class CudaLanes(Lanes):
    """Each lane is a stream; compute is the stream that is current when the lanes are made.

    The lane of transfers between stages has a stream for each edge. A slot's memory belongs to
    the track that made it, as the caching allocator sees it: a view's to the track that made what
    it is a view of. When the slot has had its last reader, its memory goes back only once that
    track has waited for every other track that read it. Lanes wait for each other all the time, so
    this costs no extra synchronisation, only a little delay; what each track has seen of the others
    tells when it is so:

        compute   GEMM  ---->  writes x      next gather waits for compute: x is freed here
        tp              gather reads x -->

    Args:
        device: a CUDA device.
        poison: see `Lanes`.
        priority: of communication streams: -1 goes before compute, 0 is its equal.
        processors: that a collective occupies, which GEMMs can leave free.
    """

    loads = True

    def __init__(
        self,
        device: torch.device,
        *,
        poison: bool = False,
        priority: int = -1,
        processors: int = 0,
    ) -> None:
        super().__init__(poison=poison)
        self.device = device
        self.processors = processors
        self._spare = False
        self._priority = priority
        self._streams = {_COMPUTE: torch.cuda.current_stream(device)}
        self._numbers: dict[Track, int] = {_COMPUTE: 0}
        self._seen: dict[Track, dict[Track, int]] = {_COMPUTE: {}}
        self._waiting: dict[Track, list[Slot]] = {_COMPUTE: []}
        self._begun: deque[dict[Track, Mark]] = deque()

    def stream(self, lane: Lane, edge: str = "") -> torch.cuda.Stream:
        """The stream of a lane or edge, made on first use."""
        track = Track(lane, edge)
        if track not in self._streams:
            self._streams[track] = torch.cuda.Stream(self.device, priority=self._priority)
            self._numbers[track] = 0
            self._seen[track] = {}
            self._waiting[track] = []
        return self._streams[track]

    def launch(
        self, operator: Operator, inputs: Sequence[Slot], crosses: bool, first: bool = False
    ) -> tuple[Any, Mark]:
        track = operator.track
        stream = self._streams.get(track) or self.stream(*track)
        if operator.waits:
            return self._look(operator, inputs)
        seen = self._seen[track]
        for slot in inputs:
            mark = slot.mark
            # Asked here as well: most slots were made on this track, or before what it waited for.
            if mark.track != track and seen.get(mark.track, -1) < mark.number:
                self._wait(track, stream, mark)
        if first:
            hold(self._streams[_COMPUTE], stream)
        values = [slot.value for slot in inputs]
        if track == _COMPUTE:
            result = operator.run(*values)
        else:
            with torch.cuda.stream(stream):
                result = operator.run(*values)
        number = self._numbers[track] = self._numbers[track] + 1
        for slot in inputs:
            for memory in slot.memories:
                if memory.owner != track:
                    memory.uses[track] = number
        mark = self._mark(track) if crosses else Mark(track, number, None, None)
        return (result.value if isinstance(result, Pending) else result), mark

    def _look(self, operator: Operator, inputs: Sequence[Slot]) -> tuple[Any, Mark]:
        """Run an operator of values that the host looks at, once they are there.

        What it writes is there at once: no lane waits for it.
        """
        for slot in inputs:
            if slot.mark.done is not None:
                slot.mark.done.synchronize()
        # A trace that marks its lane shall not mark compute.
        with torch.cuda.stream(self._streams[operator.track]):
            result = operator.run(*(slot.value for slot in inputs))
        return result, Mark(operator.track, -1, None, None)

    def share(self, spare: bool) -> None:
        if spare is not self._spare and self.processors:
            leave(self.processors if spare else 0, self.device)
            self._spare = spare

    def barrier(self) -> None:
        self._join([track for track in self._streams if track.lane is not Lane.PP])

    def drain(self) -> None:
        self.share(spare=False)
        self._join(list(self._streams))
        self._begun.clear()

    def _join(self, tracks: Sequence[Track]) -> None:
        marks = [self._mark(track) for track in tracks]
        for track in tracks:
            for mark in marks:
                self._wait(track, self._streams[track], mark)

    def settle(self, ahead: int) -> None:
        while len(self._begun) > ahead - 1:
            self._begun.popleft()
        begun = self._begun[0] if len(self._begun) == ahead - 1 else {}
        for track, slots in self._waiting.items():
            memories = [m for slot in slots for m in slot.memories if m.owner == track]
            users = {user for memory in memories for user in memory.uses}
            for user in sorted(users & begun.keys()):
                self._wait(track, self._streams[track], begun[user])
        self._begun.append({track: self._mark(track) for track in self._streams})

    def constants(self, values: Mapping[str, Any]) -> dict[str, Slot]:
        self._numbers[_COMPUTE] += 1
        mark = self._mark(_COMPUTE)
        return {name: _slot(value, mark) for name, value in values.items()}

    @contextmanager
    def on(self, lane: Lane) -> Iterator[None]:
        stream = self.stream(lane)
        self._numbers[_COMPUTE] += 1
        self._wait(Track(lane), stream, self._mark(_COMPUTE))
        with torch.cuda.stream(stream):
            yield
        self._numbers[Track(lane)] += 1

    def _mark(self, track: Track) -> Mark:
        event = torch.cuda.Event()
        event.record(self._streams[track])
        return Mark(track, self._numbers[track], event, dict(self._seen[track]))

    def _wait(self, track: Track, stream: torch.cuda.Stream, mark: Mark) -> None:
        seen = self._seen[track]
        if mark.track == track or seen.get(mark.track, -1) >= mark.number:
            return
        assert mark.done is not None, "a slot crosses lanes without an event"
        stream.wait_event(mark.done)
        for other, number in (mark.seen or {}).items():
            if other != track and seen.get(other, -1) < number:
                seen[other] = number
        seen[mark.track] = mark.number
        if self._waiting[track]:
            self._collect(track)

    def _collect(self, track: Track) -> None:
        slots, self._waiting[track] = self._waiting[track], []
        for slot in slots:
            self._free(slot)

    def _passed(self, memory: Memory) -> bool:
        if not memory.uses:
            return True
        seen = self._seen[memory.owner]
        return all(seen.get(track, -1) >= number for track, number in memory.uses.items())

    def _free(self, slot: Slot) -> None:
        for memory in slot.memories:
            if not self._passed(memory):
                self._waiting[memory.owner].append(slot)
                return
        self._drop(slot)

    def _owned_by(self, track: Track) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._streams[track])


def _slot(value: Any, mark: Mark) -> Slot:
    return value if isinstance(value, Slot) else Slot(value, mark)


def hold(held: torch.cuda.Stream, stream: torch.cuda.Stream) -> None:
    """Give what `stream` is given next a lead over what `held` is given from now on."""
    begins = torch.cuda.Event()
    begins.record(stream)
    held.wait_event(begins)
    with torch.cuda.stream(held):
        torch.cuda._sleep(round(_LEAD * CYCLES))


def make_lanes(
    device: torch.device, *, poison: bool = False, priority: int = -1, processors: int = 0
) -> Lanes:
    """The lanes of `device`; see `CudaLanes`."""
    if device.type == "cuda":
        return CudaLanes(device, poison=poison, priority=priority, processors=processors)
    return CpuLanes(poison=poison)
