"""Notes when each operator of a real step starts and ends."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from lightning_dhellam.parallel.collectives import Pending
from lightning_dhellam.plan import GraphPair, Operator, Strand


class Span(NamedTuple):
    """One operator of a step that was carried out.

    Attributes:
        operator: what ran.
        strand: of its micro-batch.
        layer: index.
        micro_batch: index.
        start: seconds since the tracer was made.
        end: seconds since the tracer was made.
    """

    operator: Operator
    strand: Strand
    layer: int
    micro_batch: int
    start: float
    end: float


class Tracer:
    """Times operators where they run, without holding up what follows.

    On CUDA two events surround each operator on its own stream. On CPU compute runs inline, and a
    thread waits for the end of each communication.

    Args:
        layers: whose operators will run.
        device: where.
    """

    def __init__(self, layers: Sequence[GraphPair], device: torch.device) -> None:
        self._places = {
            id(operator): (graph.direction, index)
            for index, pair in enumerate(layers)
            for graph in (pair.forward, pair.backward)
            for operator in (*graph.receives, *graph.operators, *graph.sends)
        }
        self._places |= {
            id(operator): (Strand.FORWARD, index)
            for index, pair in enumerate(layers)
            for operator in pair.forward.preparation
        }
        self._timer: _HostTimer | _DeviceTimer
        self._timer = _DeviceTimer() if device.type == "cuda" else _HostTimer()
        self._ran: list[tuple[Operator, Callable[[], tuple[float, float]]]] = []

    def traced(self, operator: Operator, made: Operator) -> Operator:
        """What was `made` of an operator, which notes when it runs."""

        def run(*values: Any) -> Any:
            result, times = self._timer.run(made, values)
            self._ran.append((operator, times))
            return result

        return replace(made, run=run)

    def spans(self) -> list[Span]:
        """What ran so far, in issue order. Waits for its end."""
        seen: Counter[int] = Counter()
        found = []
        for operator, times in self._ran:
            if id(operator) in self._places:
                strand, layer = self._places[id(operator)]
                number = seen[id(operator)]
                found.append(Span(operator, strand, layer, number, *times()))
            seen[id(operator)] += 1
        return found


class _HostTimer:
    def __init__(self) -> None:
        self._zero = time.perf_counter()

    def run(
        self, operator: Operator, values: Sequence[Any]
    ) -> tuple[Any, Callable[[], tuple[float, float]]]:
        start = self._now()
        result = operator.run(*values)
        if isinstance(result, Pending) and result.work is not None:
            ends: list[float] = []
            watcher = threading.Thread(target=self._watch, args=(result.work, ends))
            watcher.start()

            def times() -> tuple[float, float]:
                watcher.join()
                return start, ends[0]

            return result, times
        end = self._now()
        return result, lambda: (start, end)

    def _watch(self, work: Any, ends: list[float]) -> None:
        try:
            work.wait()
        finally:
            ends.append(self._now())

    def _now(self) -> float:
        return time.perf_counter() - self._zero


class _DeviceTimer:
    def __init__(self) -> None:
        self._zero = _event()

    def run(
        self, operator: Operator, values: Sequence[Any]
    ) -> tuple[Any, Callable[[], tuple[float, float]]]:
        start = _event()
        result = operator.run(*values)
        end = _event()

        def times() -> tuple[float, float]:
            end.synchronize()
            zero = self._zero
            return zero.elapsed_time(start) / 1000, zero.elapsed_time(end) / 1000

        return result, times


def _event() -> torch.cuda.Event:
    """Recorded on the stream that is current: the lane's, inside of a launch."""
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
