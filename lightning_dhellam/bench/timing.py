"""Times of short device work, without the gaps between launches and without the cache's help."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache
from statistics import median
from typing import Any

import torch

_REPEATS = 7
_SPREAD = 256 << 20
"""Bytes that the tensors of one measurement should have together: several L2 caches of a GPU."""

Calls = Sequence[Callable[[], Any]]


def seconds(calls: Calls, device: torch.device, *, captured: bool = True) -> float:
    """Median time of one call, when `calls` run back to back.

    On a GPU they are captured as a CUDA graph, unless `captured` is False. The calls do the same
    work on different tensors, which together should exceed the L2 cache.
    """
    if device.type != "cuda":
        return median(_on_cpu(calls) for _ in range(3)) / len(calls)
    for call in calls[:2]:  # compiles, and makes handles
        call()
    torch.cuda.synchronize()
    if not captured:
        return median(_elapsed(lambda: _all(calls)) for _ in range(_REPEATS)) / len(calls)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Results are kept, so that calls write to different memory.
        kept = _all(calls)
    graph.replay()
    times = [_elapsed(graph.replay) for _ in range(_REPEATS)]
    del kept
    graph.reset()
    return median(times) / len(calls)


def _all(calls: Calls) -> list[Any]:
    return [call() for call in calls]


def _elapsed(action: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    action()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def _on_cpu(calls: Calls) -> float:
    begin = time.perf_counter()
    _all(calls)
    return time.perf_counter() - begin


def rotations(moved: int) -> int:
    """Sets of tensors to go through in turn, of `moved` bytes each, so that no cache helps."""
    return max(2, min(8, _SPREAD // moved + 1))


@cache
def copy_bandwidth(device: torch.device, moved: int) -> float:
    """Bytes per second of the fastest device copy that reads and writes `moved` bytes in all.

    A large copy is faster than a small one, so a kernel is compared with one of its own size: by
    the driver, whose copies of a CUDA graph reach no more than two thirds of the memory's rate on
    an H200, or by a kernel that does next to nothing.
    """
    elements = max(1, moved // 4)
    sets = [
        torch.randn(2, elements, device=device, dtype=torch.bfloat16)
        for _ in range(rotations(moved))
    ]
    ways = (
        [lambda pair=pair: pair[1].copy_(pair[0]) for pair in sets],
        [lambda pair=pair: torch.neg(pair[0], out=pair[1]) for pair in sets],
    )
    return max(4 * elements / seconds(calls, device) for calls in ways)
