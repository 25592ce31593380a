"""What each of the two hosts runs: `python -m lightning_dhellam.bench.host RANK SETTINGS`."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lightning_dhellam.bench.hosts import Host


@dataclass(frozen=True)
class Settings:
    """What is trained, how often, and over what.

    Attributes:
        rates: of the link, in Gbit/s.
        layers: of the model.
        hidden: its width, of heads of 64.
        ffn: width of its MLP.
        length: tokens of a sequence.
        micro_batch: sequences of one.
        micro_batches: of a step.
        vocabulary: tokens of the model.
        rounds: repetitions of each side that count.
        sides: in this order.
    """

    rates: list[float]
    layers: int
    hidden: int
    ffn: int
    length: int
    micro_batch: int
    micro_batches: int
    vocabulary: int
    rounds: int
    sides: list[str]


def main(argv: list[str]) -> None:
    """Join the other host, and measure every side at every rate."""
    host = Host(int(argv[0]))
    settings = Settings(**json.loads(argv[1]))
    warnings.simplefilter("ignore")
    host.join()
    try:
        measure(host, settings)
    finally:
        dist.destroy_process_group()


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
        """Of all processors since the beginning. Both hosts must ask."""
        busy, total, own = (b - a for a, b in zip(self._begin, self._now(), strict=True))
        both = torch.tensor(own, dtype=torch.float64)
        dist.all_reduce(both)
        return max(0.0, (busy - both.item()) / total)

    def _now(self) -> tuple[float, float, float]:
        """Seconds: busy and altogether of all processors, and of this process."""
        with open("/proc/stat") as file:
            ticks = [int(word) for word in file.readline().split()[1:9]]
        second = os.sysconf("SC_CLK_TCK")
        idle = ticks[3] + ticks[4]
        return (sum(ticks) - idle) / second, sum(ticks) / second, time.process_time()


def measure(host: Host, settings: Settings) -> None:
    """Report a result for each rate."""
    from lightning_dhellam.bench.duel import Duel

    duel = Duel(settings)
    for rate in settings.rates:
        host.limit(rate * 1e9)
        dist.barrier()
        achieved = link_rate() / 1e9
        strangers = Strangers()
        result = duel.measure()
        others = strangers.share()
        host.report({"rate": rate, "achieved": achieved, "others": others, **result})


if __name__ == "__main__":
    main(sys.argv[1:])
