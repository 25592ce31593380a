"""Plays the links of an emulated cluster: occupies a communication lane for as long as it takes.

copy engine   a real copy-engine transfer of that duration, to or from the host: no SM is busy
SMs           a kernel that moves the real bytes on n SMs, paced by the device's timer
timer         on a CPU: work that is done at that moment, and keeps no core busy
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from enum import StrEnum
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from lightning_dhellam.parallel.communicator import Communicators
from lightning_dhellam.parallel.emulate import Link
from lightning_dhellam.parallel.stand_in import Done, EmulatedGroup, crossing
from lightning_dhellam.plan import Collective, Lane


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
    """Carries collectives over a link that is not there: it occupies the lane that is current for
    as long as a transfer would take. See `Transport`, though nothing comes from other ranks.

    Args:
        link: what to emulate; None for one over which everything takes no time.
        device: that computes.
        rank: of this process among those that the link connects.
        outward: which of a GPU's two copy engines plays it: that which copies to the host, or that
            which copies from it. Links on the same one wait for each other.

    Attributes:
        play: what it does; `Play.TIME` unless somebody changes it.
        link: what is emulated now.
    """

    def __init__(
        self, link: Link | None, device: torch.device, rank: int = 0, *, outward: bool = False
    ) -> None:
        self.play = Play.TIME
        self._device = device
        self._rank = rank
        self._outward = outward
        self._filled: dict[int, int] = {}
        self._players: dict[int, _Player] = {}
        self.become(link)

    def become(self, link: Link | None) -> None:
        """Emulate another link from now on, for the same operators."""
        self.link = link
        if link is not None:
            for sms in {link.sms, *(other.sms for _, other in link.collectives)}:
                self._player(sms)

    def refill(self) -> None:
        """Make up anew what arrives, where memory was given back: it may hold zeros now."""
        self._filled.clear()

    def all_gather(self, x: Tensor, out: Tensor) -> dist.Work | None:
        """See `Transport`. What is no number, such as how many rows each rank sends, is this rank's
        of all ranks: how much work there is depends on it.
        """
        if self.play is Play.ECHO or not x.is_floating_point():
            out.view(-1, *x.shape).copy_(x)
        if self.play is Play.ECHO:
            return None
        if not x.is_floating_point():
            return self._play(Collective.ALL_GATHER, (), out.nbytes - x.nbytes)
        return self._play(Collective.ALL_GATHER, (out,), out.nbytes - x.nbytes)

    def reduce_scatter(self, x: Tensor, out: Tensor) -> dist.Work | None:
        """See `Transport`."""
        if self.play is Play.ECHO:
            torch.mul(x[: out.shape[0]], x.shape[0] // out.shape[0], out=out)
            return None
        return self._play(Collective.REDUCE_SCATTER, (out,), x.nbytes - out.nbytes)

    def exchange(
        self, sent: Sequence[Tensor], received: Sequence[Tensor], target: int, source: int
    ) -> dist.Work | None:
        """See `Transport`. Both directions go at once."""
        if self.play is Play.ECHO:
            for x, out in zip(sent, received, strict=True):
                _repeat(x, out)
            return None
        crossing = max(sum(x.nbytes for x in sent), sum(out.nbytes for out in received))
        return self._play(Collective.EXCHANGE, received, crossing)

    def all_to_all(
        self,
        sent: Sequence[Tensor],
        received: Sequence[Tensor],
        given: Sequence[int],
        taken: Sequence[int],
    ) -> dist.Work | None:
        """See `Transport`. Both directions go at once; what a rank keeps crosses nothing.

        What arrives decides which experts tokens choose in the next layer, and so how much work
        there is. On a GPU only what this lane received before, or what was made up, lies where it
        arrives. On a CPU anything may, so this rank's rows are brought whatever is played.
        """
        brings = self.play is Play.ECHO or self._device.type == "cpu"
        if brings:
            for x, out in zip(sent, received, strict=True):
                own = x.split(list(given))[self._rank]
                for part in out.split(list(taken)):
                    _repeat(own, part)
        if self.play is Play.ECHO:
            return None
        leaves = sum(crossing(x, given, self._rank) for x in sent)
        arrives = sum(crossing(out, taken, self._rank) for out in received)
        made_up = () if brings else received
        return self._play(Collective.ALL_TO_ALL, made_up, max(leaves, arrives))

    def processors(self, collective: Collective) -> int:
        """See `Transport`."""
        return 0 if self.link is None else self.link.of(collective).sms

    def carry(self, crossing: int) -> dist.Work:
        """Occupy the stream that is current, for as long as so many bytes take."""
        if self.link is None or self.play is not Play.TIME:
            return Done()
        work = self._player(self.link.sms)(crossing, self.link.seconds(crossing))
        return work or _OnStream()

    def _play(
        self, collective: Collective, outs: Sequence[Tensor], crossing: int
    ) -> dist.Work | None:
        """Pretend that `outs` were received, by `crossing` bytes over the link."""
        for out in outs:
            self._fill(out)
        if self.play is Play.NOTHING or self.link is None:
            return None
        link = self.link.of(collective)
        return self._player(link.sms)(crossing, link.seconds(crossing))

    def _fill(self, out: Tensor) -> None:
        """Make up what arrives, once for each place, and again where more arrives there.

        Nothing arrives, so `out` holds what was there before: other operators' numbers, but zeros
        or NaN at first, on which matrix products run faster (13% on an H200). What is no number,
        such as an index, is made zero.
        """
        if self._filled.get(out.data_ptr(), 0) >= out.nbytes:
            return
        self._filled[out.data_ptr()] = out.nbytes
        if not out.is_floating_point():
            out.zero_()
        elif out.itemsize > 1:
            out.normal_()
        else:
            out.copy_(torch.randn(out.shape, device=out.device))

    def _player(self, sms: int) -> _Player:
        """What occupies the lane on so many SMs. On a CPU transfers queue behind each other."""
        key = sms if self._device.type == "cuda" else 0
        if key not in self._players:
            self._players[key] = _player(sms, self._device, self._outward)
        return self._players[key]

    def calibration(self, crossing: int) -> tuple[float, float]:
        """Seconds asked for `crossing` bytes, and the median of what they really take."""
        assert self.link is not None, "a link that takes no time"
        asked = self.link.seconds(crossing)
        play = self._player(self.link.sms)
        return asked, _median_of(self._device, lambda: play(crossing, asked))

    def calibrated(self, sizes: tuple[int, ...] = (1 << 20, 16 << 20, 112 << 20)) -> str:
        """The calibration at some sizes in bytes, as text: asked against achieved."""
        parts = []
        for size in sizes:
            asked, taken = self.calibration(size)
            times = f"{asked * 1e6:.0f} µs asked, {taken * 1e6:.0f} µs taken"
            parts.append(f"{size / 2**20:g} MiB {times} ({taken / asked - 1:+.1%})")
        return f"{self.link}: {'; '.join(parts)}"


_OUTWARD = (Lane.CP, Lane.EP, Lane.PP)
"""Lanes whose links are not to wait for those that are busy beside them: `tp` and `dp`."""


def play_links(
    links: Mapping[str, Link],
    groups: ProcessGroupCollection,
    communicators: Communicators,
    device: torch.device,
) -> Communicators:
    """The communicators of an emulated cluster, with its links by lane.

    What Megatron-core starts itself in the groups of a lane goes over the same link.
    """
    played = dict(communicators)
    for lane, communicator in communicators.items():
        others = (groups.dp_cp, groups.expt_dp) if lane is Lane.DP else ()
        of_lane = [group for group in (communicator.group, *others) if group.size() > 1]
        if not of_lane:
            continue
        link = EmulatedLink(links.get(lane), device, communicator.rank, outward=lane in _OUTWARD)
        if communicator.size > 1:
            played[lane] = replace(communicator, transport=link)
        for group in of_lane:
            if isinstance(group, EmulatedGroup):
                group.link = link
    return played


def _repeat(x: Tensor, out: Tensor) -> None:
    """Fill the rows of `out` with those of `x`, again and again."""
    if out.numel() and not len(x):
        out.zero_()
    elif out.numel():
        out.copy_(x[torch.arange(len(out), device=x.device) % len(x)])


_Player = Callable[[int, float], "dist.Work | None"]


def _player(sms: int, device: torch.device, outward: bool) -> _Player:
    if device.type != "cuda":
        return _ByTimer()
    if sms:
        return _ByKernel(sms, device)
    engine = CopyEngine(device, outward=outward)
    return lambda crossing, seconds: engine(seconds)


class CopyEngine:
    """Copies from or to pinned host memory: a transfer in which no SM takes part.

    Args:
        device: a CUDA device.
        size: bytes of one copy at most; longer transfers are several.
        outward: copy to the host, which another engine does beside copies from it.
    """

    def __init__(
        self, device: torch.device, size: int = 256 << 20, *, outward: bool = False
    ) -> None:
        self._size = size
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        here = torch.empty(size, dtype=torch.uint8, device=device)
        self._from, self._to = (here, host) if outward else (host, here)
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
        self._to[:size].copy_(self._from[:size], non_blocking=True)


class _ByKernel:
    """Moves the bytes inside device memory on a few SMs, no faster than the link would."""

    def __init__(self, sms: int, device: torch.device) -> None:
        self._sms = sms
        self._from = torch.randn(64 << 20, device=device).bfloat16()
        self._to = torch.empty_like(self._from)
        self._overhead = 0.0
        asked = 0.5e-3
        # Of a few bytes: what many need beyond the time asked for is not spent on starting.
        taken = median_seconds(lambda: self(1, asked))
        self._overhead = max(0.0, taken - asked)

    def __call__(self, crossing: int, seconds: float) -> None:
        from lightning_dhellam.kernels.paced_copy import paced_copy

        paced = max(0.0, seconds - self._overhead)
        paced_copy(self._from, self._to, crossing, paced, self._sms)


class _OnStream(dist.Work):
    """Work of the stream that was current when it was made."""

    def __init__(self) -> None:
        super().__init__()
        self._end = torch.cuda.Event()
        self._end.record()

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Make the stream that is current wait for it, and not the host."""
        torch.cuda.current_stream().wait_event(self._end)
        return True

    def is_completed(self) -> bool:
        """Whether the device has come to its end."""
        return self._end.query()


class _ByTimer:
    """One transfer after the other, each done at its moment; nothing computes meanwhile."""

    def __init__(self) -> None:
        self._free = 0.0

    def __call__(self, crossing: int, seconds: float) -> dist.Work:
        self._free = max(self._free, time.perf_counter()) + seconds
        return _DoneAt(self._free)


class _DoneAt(dist.Work):
    """Work that is done at a moment of the host's time."""

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
