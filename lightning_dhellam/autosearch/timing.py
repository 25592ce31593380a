"""When the steps of a search, and the operators in them, began and ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch

from lightning_dhellam.engine import Span
from lightning_dhellam.search.model import Interval


class Stopwatch:
    """Times a step without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._on_device = device.type == "cuda"
        self._moments: list[Any] = []

    @property
    def stopped(self) -> bool:
        return len(self._moments) == 2

    def start(self) -> None:
        self._moments = [self._now()]

    def stop(self) -> None:
        if len(self._moments) == 1:
            self._moments.append(self._now())

    def seconds(self) -> float:
        start, end = self._moments
        if not self._on_device:
            return float(end - start)
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    def _now(self) -> Any:
        if not self._on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def intervals(spans: Sequence[Span]) -> tuple[Interval, ...]:
    """A traced step as a timeline, with time 0 at its start."""
    first = min((span.start for span in spans), default=0.0)
    return tuple(
        Interval(
            span.operator.lane,
            span.strand,
            span.operator.name,
            span.layer,
            span.micro_batch,
            span.start - first,
            span.end - first,
        )
        for span in spans
    )
