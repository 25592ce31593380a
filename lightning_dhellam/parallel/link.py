"""Plays the links of an emulated cluster: occupies a communication lane for as long as it takes.

copy engine   a real copy-engine transfer of that duration: no SM is busy
SMs           a kernel that moves the real bytes on n SMs, paced by the device's timer
timer         on a CPU: work that is done at that moment, and keeps no core busy
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from enum import StrEnum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dhellam.parallel.emulate import Link


class Play(StrEnum):
    """What an emulated link does.

    TIME takes the time of a transfer and brings nothing. ECHO takes no time of its own and brings
    what it would if every rank held this rank's numbers: with it results can be compared. NOTHING
    takes no time and brings nothing: what is left is compute alone.
    """

    TIME = "time"
    ECHO = "echo"
    NOTHING = "nothing"


class EmulatedLink:
    """Occupies the lane that is current for as long as a transfer over `link` would take.

    Args:
        link: what to emulate.
        device: that computes.

    Attributes:
        play: what it does; `Play.TIME` unless somebody changes it.
    """

    def __init__(self, link: Link, device: torch.device) -> None:
        self.play = Play.TIME
        self._device = device
        self._filled: set[tuple[int, int]] = set()
        self._occupy = _player(link, device)
        self.link = link

    def become(self, link: Link) -> None:
        """Emulate another link from now on, for the same operators."""
        if link.sms != self.link.sms:
            self._occupy = _player(link, self._device)
        self.link = link

    def refill(self) -> None:
        """Make up anew what arrives, where memory was given back: it may hold zeros now."""
        self._filled.clear()

    def all_gather(self, x: Tensor, out: Tensor) -> dist.Work | None:
        """As a `Transport`, but nothing comes from other ranks."""
        return self._carry(x, out, crossing=out.nbytes - x.nbytes)

    def reduce_scatter(self, x: Tensor, out: Tensor) -> dist.Work | None:
        """As a `Transport`, but nothing comes from other ranks."""
        return self._carry(x, out, crossing=x.nbytes - out.nbytes)

    def _carry(self, x: Tensor, out: Tensor, crossing: int) -> dist.Work | None:
        """Pretend that `out` was made from `x` of every rank, by `crossing` bytes over the link."""
        if self.play is Play.ECHO:
            _echo(x, out)
            return None
        key = (out.data_ptr(), out.nbytes)
        if key not in self._filled:
            # Nothing arrives, so `out` holds what was there before: other operators' numbers, but
            # zeros or NaN at first, on which matrix products run faster (13% on an H200).
            self._filled.add(key)
            out.normal_()
        if self.play is Play.NOTHING:
            return None
        return self._occupy(crossing, self.link.seconds(crossing))

    def calibration(self, crossing: int) -> tuple[float, float]:
        """Seconds asked for `crossing` bytes, and the median of what they really take."""
        asked = self.link.seconds(crossing)
        return asked, _median_of(self._device, lambda: self._occupy(crossing, asked))

    def calibrated(self, sizes: tuple[int, ...] = (1 << 20, 16 << 20, 112 << 20)) -> str:
        """The calibration at some sizes in bytes, as text: asked against achieved."""
        parts = []
        for size in sizes:
            asked, taken = self.calibration(size)
            times = f"{asked * 1e6:.0f} µs asked, {taken * 1e6:.0f} µs taken"
            parts.append(f"{size / 2**20:g} MiB {times} ({taken / asked - 1:+.1%})")
        return f"{self.link}: {'; '.join(parts)}"


def _echo(x: Tensor, out: Tensor) -> None:
    """What a collective brings if every rank holds `x`: the first rank's part of it."""
    if out.numel() > x.numel():
        out.view(-1, *x.shape).copy_(x)
    else:
        torch.mul(x[: out.shape[0]], x.shape[0] // out.shape[0], out=out)


_Player = Callable[[int, float], "dist.Work | None"]


def _player(link: Link, device: torch.device) -> _Player:
    if device.type != "cuda":
        return _ByTimer()
    if link.sms:
        return _ByKernel(link, device)
    engine = CopyEngine(device)
    return lambda crossing, seconds: engine(seconds)


class CopyEngine:
    """Copies from pinned host memory: a transfer in which no SM takes part.

    Args:
        device: a CUDA device.
        size: bytes of one copy at most; longer transfers are several.
    """

    def __init__(self, device: torch.device, size: int = 256 << 20) -> None:
        self._size = size
        self._host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        self._device = torch.empty(size, dtype=torch.uint8, device=device)
        large = min(size, 64 << 20)
        small = large // 64
        short = median_seconds(lambda: self._copy(small))
        long = median_seconds(lambda: self._copy(large))
        self._rate = (large - small) / (long - short)
        self._overhead = max(0.0, short - small / self._rate)

    def __call__(self, seconds: float) -> None:
        """Occupy the current stream for so long."""
        size = max(1, round((seconds - self._overhead) * self._rate))
        for start in range(0, size, self._size):
            self._copy(min(size - start, self._size))

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
        # Of a few bytes: what many need beyond the time asked for is not spent on starting.
        taken = median_seconds(lambda: self(1, asked))
        self._overhead = max(0.0, taken - asked)

    def __call__(self, crossing: int, seconds: float) -> None:
        from lightning_dhellam.kernels.link import paced_copy

        paced = max(0.0, seconds - self._overhead)
        paced_copy(self._from, self._to, crossing, paced, self._sms)


class _ByTimer:
    """One transfer after the other, each done at its moment; nothing computes meanwhile."""

    def __init__(self) -> None:
        self._free = 0.0

    def __call__(self, crossing: int, seconds: float) -> dist.Work:
        self._free = max(self._free, time.perf_counter()) + seconds
        return _DoneAt(self._free)


class _DoneAt(dist.Work):
    """Work that is done at a moment of the host's clock."""

    def __init__(self, moment: float) -> None:
        super().__init__()
        self._moment = moment

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        left = self._moment - time.perf_counter()
        if left > 0:
            time.sleep(left)
        return True

    def is_completed(self) -> bool:
        return time.perf_counter() >= self._moment


def _median_of(device: torch.device, launch: Callable[[], Any], repeats: int = 5) -> float:
    if device.type == "cuda":
        return median_seconds(launch)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        launch().wait()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


_HEAD_START = 1_000_000
"""Cycles that the device idles while the host starts something: about 0.6 ms."""


def median_seconds(launch: Callable[[], Any], repeats: int = 11) -> float:
    """Median time that what `launch` starts occupies the current stream of a GPU.

    As in a step, the host is ahead: what it needs to start a transfer is no part of it.
    """
    times = []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(_HEAD_START)
        start.record()
        launch()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return sorted(times[3:])[repeats // 2]
