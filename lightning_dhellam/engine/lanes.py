"""The lanes of a device: on the host, or streams.

The only place that knows streams, events and works.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from lightning_dhellam.engine.tape import Mark, Slot
from lightning_dhellam.engine.tracks import COMPUTE, Lanes, TrackLanes, slot_of
from lightning_dhellam.kernels.linear.processors import leave
from lightning_dhellam.parallel.collectives import Pending
from lightning_dhellam.parallel.work import Work
from lightning_dhellam.plan import Lane, Operator, Track

CYCLES = 1.7e9
"""Of a device in a second, about."""
_LEAD = 4e-6
"""Seconds by which communication that goes first is ahead of compute. Without, NCCL's kernels lose:
on two H200 (2026-11-25) a gather issued before a GEMM then takes 5.2 ms instead of 0.4, since the
GEMM has every multiprocessor; 2 µs are enough."""


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
        mark = Mark(COMPUTE, 0, None, None)
        return {name: slot_of(value, mark) for name, value in values.items()}

    @contextmanager
    def on(self, lane: Lane) -> Iterator[None]:
        yield

    def _free(self, slot: Slot) -> None:
        if self.poison and any(memory.uses for memory in slot.memories):
            return  # a running work may still read it; it holds its own reference
        self._drop(slot)


class CudaLanes(TrackLanes):
    """Each track is a stream; compute is the stream that is current when the lanes are made.

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
        self.device = device
        self.processors = processors
        self._spare = False
        self._priority = priority
        self._streams: dict[Track, torch.cuda.Stream] = {}
        super().__init__(poison=poison)

    def stream(self, lane: Lane, edge: str = "") -> torch.cuda.Stream:
        """The stream of a lane or edge, made on first use."""
        track = Track(lane, edge)
        if track not in self._streams:
            self._open(track)
        return self._streams[track]

    def share(self, spare: bool) -> None:
        if spare is not self._spare and self.processors:
            leave(self.processors if spare else 0, self.device)
            self._spare = spare

    def drain(self) -> None:
        self.share(spare=False)
        super().drain()

    @contextmanager
    def on(self, lane: Lane) -> Iterator[None]:
        stream = self.stream(lane)
        self._numbers[COMPUTE] += 1
        self._wait(Track(lane), self._mark(COMPUTE))
        with torch.cuda.stream(stream):
            yield
        self._numbers[Track(lane)] += 1

    def _open(self, track: Track) -> None:
        super()._open(track)
        if track == COMPUTE:
            self._streams[track] = torch.cuda.current_stream(self.device)
        else:
            self._streams[track] = torch.cuda.Stream(self.device, priority=self._priority)

    def _run(self, operator: Operator, values: Sequence[Any], first: bool) -> Any:
        track = operator.track
        stream = self._streams[track]
        if first:
            hold(self._streams[COMPUTE], stream)
        if track == COMPUTE:
            return operator.run(*values)
        with torch.cuda.stream(stream):
            return operator.run(*values)

    def _look(self, operator: Operator, inputs: Sequence[Slot]) -> Any:
        for slot in inputs:
            if slot.mark.done is not None:
                slot.mark.done.synchronize()
        # A trace that marks its lane shall not mark compute.
        with torch.cuda.stream(self._streams[operator.track]):
            return operator.run(*(slot.value for slot in inputs))

    def _record(self, track: Track) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(self._streams[track])
        return event

    def _follow(self, track: Track, done: Any) -> None:
        self._streams[track].wait_event(done)

    def _owned_by(self, track: Track) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._streams[track])


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
