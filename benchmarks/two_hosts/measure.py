"""Measures on a host, at each rate of the link, all sides and what else the machine does."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist

from benchmarks.two_hosts.duel import Duel
from benchmarks.two_hosts.hosts import Host
from benchmarks.two_hosts.settings import Settings


def measure(host: Host, settings: Settings) -> None:
    """Measure every side at each rate, and report a result for each."""
    duel = Duel(settings)
    for rate in settings.rates:
        host.limit(rate * 1e9)
        dist.barrier()
        achieved = link_rate() / 1e9
        strangers = Strangers()
        result = duel.measure()
        others = strangers.share()
        host.report({"rate": rate, "achieved": achieved, "others": others, **result})


def link_rate(size: int = 4 << 20, repeats: int = 3) -> float:
    """Bits per second that gloo's all-gather brings each host, the median.

    Less than the link's: gloo lets the two directions wait for each other.
    """
    x = torch.zeros(size, dtype=torch.uint8)
    parts = [torch.empty_like(x) for _ in range(2)]
    times = []
    for _ in range(repeats):
        dist.barrier()
        begin = time.perf_counter()
        dist.all_gather(parts, x)
        times.append(time.perf_counter() - begin)
    return 8 * size / sorted(times)[repeats // 2]


class Strangers:
    """How much of the machine's processors others take while both hosts measure."""

    def __init__(self) -> None:
        self._begin = self._now()

    def share(self) -> float:
        """The share that others took of all processors since this was made. Both hosts must ask."""
        busy, total, own = (b - a for a, b in zip(self._begin, self._now(), strict=True))
        both = torch.tensor(own, dtype=torch.float64)
        dist.all_reduce(both)
        return max(0.0, (busy - both.item()) / total)

    def _now(self) -> tuple[float, float, float]:
        """Seconds that all processors were busy, that they had, and that this process took."""
        with open("/proc/stat") as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]
        second = os.sysconf("SC_CLK_TCK")
        idle = ticks[3] + ticks[4]
        return (sum(ticks) - idle) / second, sum(ticks) / second, time.process_time()
