"""One process as a rank of a cluster: real shards, real kernels, links emulated in time.

With torch's `fake` process group Megatron-core builds this rank's real shards of a model of any
world size, and collectives do nothing. A link then occupies the communication lane for the time
that the transfer would take, in one of two manners:

    copy engine   a real copy-engine transfer of that duration: no SM is busy
    SMs           a kernel that moves the real bytes on n SMs, paced by the device's timer

Numbers computed this way mean nothing; times do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from torch import Tensor

_COMMUNICATORS = ("tp",)


@dataclass(frozen=True)
class Link:
    """What connects this rank to the others of one communicator.

    Attributes:
        bandwidth: bytes per second that this rank sends, and receives, at once.
        latency: seconds before the first byte.
        sms: streaming multiprocessors that the transfer keeps busy; 0 for the copy engine.
    """

    bandwidth: float
    latency: float = 10e-6
    sms: int = 0

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth={self.bandwidth} must be more than 0 bytes per second")
        if not self.latency >= 0:
            raise ValueError(f"latency={self.latency} must be at least 0 seconds")
        if self.sms < 0:
            raise ValueError(f"sms={self.sms} must be at least 0; 0 is the copy engine")

    def seconds(self, crossing: int) -> float:
        """How long `crossing` bytes take."""
        return self.latency + crossing / self.bandwidth


@dataclass(frozen=True)
class Cluster:
    """The cluster that a run pretends to be part of.

    Attributes:
        world_size: ranks.
        links: by communicator; `tp`. Links of other communicators take no time.
        rank: which of them this process is.
        source: where the figures come from.
    """

    world_size: int
    links: Mapping[str, Link]
    rank: int = 0
    source: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank} must be below world_size={self.world_size}")
        unknown = sorted(set(self.links) - set(_COMMUNICATORS))
        if unknown:
            raise ValueError(f"links: '{unknown[0]}' is not one of {', '.join(_COMMUNICATORS)}")

    @classmethod
    def load(cls, path: str | Path) -> Cluster:
        """Read a cluster file.

        Raises:
            ValueError: the file is missing, or a field is missing, unknown or out of range.
        """
        try:
            given = yaml.safe_load(Path(path).read_text())
        except OSError as error:
            raise ValueError(f"cluster file {path}: {error.strerror}") from error
        if not isinstance(given, dict):
            raise ValueError(f"cluster file {path} must be a mapping with world_size and links")
        links = {name: _known(Link, link, path) for name, link in given.pop("links", {}).items()}
        cluster: Cluster = _known(cls, {**given, "links": links}, path)
        return cluster

    def join(self) -> None:
        """Initialise torch.distributed as this rank, without any other process."""
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group(
            "fake", store=FakeStore(), rank=self.rank, world_size=self.world_size
        )


def _known(kind: Any, given: Mapping[str, Any], path: str | Path) -> Any:
    names = [field.name for field in fields(kind)]
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(f"cluster file {path}: unknown field '{unknown[0]}': use {names}")
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(f"cluster file {path}: {error}") from error


class EmulatedLink:
    """Occupies the stream that is current for as long as a transfer over `link` would take.

    Args:
        link: what to emulate.
        device: a CUDA device.
    """

    def __init__(self, link: Link, device: torch.device) -> None:
        self.link = link
        self._filled: set[tuple[int, int]] = set()
        self._occupy: _ByKernel | _ByCopyEngine
        self._occupy = _ByKernel(link, device) if link.sms else _ByCopyEngine(device)

    def carry(self, out: Tensor, crossing: int) -> None:
        """Pretend that `out` was made from `crossing` bytes that came over the link."""
        key = (out.data_ptr(), out.nbytes)
        if key not in self._filled:
            # Nothing arrives, so `out` holds what was there before: other operators' numbers, but
            # zeros or NaN at first, on which matrix products run faster (13% on an H200).
            self._filled.add(key)
            out.normal_()
        self._occupy(crossing, self.link.seconds(crossing))

    def calibration(self, crossing: int) -> tuple[float, float]:
        """Seconds asked for `crossing` bytes, and the median of what they really take."""
        asked = self.link.seconds(crossing)
        return asked, median_seconds(lambda: self._occupy(crossing, asked))


class _ByCopyEngine:
    """Copies from pinned host memory: a transfer in which no SM takes part."""

    _SIZE = 256 << 20

    def __init__(self, device: torch.device) -> None:
        self._host = torch.empty(self._SIZE, dtype=torch.uint8, pin_memory=True)
        self._device = torch.empty(self._SIZE, dtype=torch.uint8, device=device)
        small, large = 1 << 20, 64 << 20
        short = median_seconds(lambda: self._copy(small))
        long = median_seconds(lambda: self._copy(large))
        self._rate = (large - small) / (long - short)
        self._overhead = max(0.0, short - small / self._rate)

    def __call__(self, crossing: int, seconds: float) -> None:
        size = max(1, round((seconds - self._overhead) * self._rate))
        for start in range(0, size, self._SIZE):
            self._copy(min(size - start, self._SIZE))

    def _copy(self, size: int) -> None:
        self._device[:size].copy_(self._host[:size], non_blocking=True)


class _ByKernel:
    """Moves the bytes inside device memory on a few SMs, no faster than the link would."""

    def __init__(self, link: Link, device: torch.device) -> None:
        self._sms = link.sms
        self._from = torch.randn(64 << 20, device=device).bfloat16()
        self._to = torch.empty_like(self._from)
        self._overhead = 0.0
        asked = 0.5e-3
        taken = median_seconds(lambda: self(round(asked * link.bandwidth), asked))
        self._overhead = max(0.0, taken - asked)

    def __call__(self, crossing: int, seconds: float) -> None:
        from lightning_dhellam.kernels.link import paced_copy

        paced = max(0.0, seconds - self._overhead)
        paced_copy(self._from, self._to, crossing, paced, self._sms)


def median_seconds(launch: Callable[[], None], repeats: int = 11) -> float:
    """Median time that what `launch` starts occupies the current stream."""
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return sorted(times[3:])[repeats // 2]
