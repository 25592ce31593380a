"""Times of short device work, without the gaps between launches and without the cache's help."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

_REPEATS = 7

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


def copy_bandwidth(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes read and written per second by a device copy of `size` bytes."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds([lambda: target.copy_(source)] * 5, device)
