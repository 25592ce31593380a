"""Times of short GPU work, without the gaps between launches and without the cache's help."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

_REPEATS = 5


def seconds(calls: Sequence[Callable[[], Any]]) -> float:
    """Median time of one call, when `calls` run back to back as a CUDA graph.

    The calls do the same work on different tensors, which together should exceed the L2 cache.
    """
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    graph.replay()
    times = [_elapsed(graph.replay) / len(calls) for _ in range(_REPEATS)]
    del kept
    graph.reset()
    return median(times)


def _elapsed(action: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    action()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def copy_bandwidth(size: int = 1 << 30) -> float:
    """Bytes read and written per second by a device copy of `size` bytes."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * size / seconds([lambda: target.copy_(source)] * 5)
