"""What carries exchanges between GPUs that share sequences, and transfers between the stages of a
pipeline, as it was asked for or measured.

    nccl           sends and receives by processors
    copy_engine    each GPU pulls from the memory of another, on one host (`copy_engine.py`)
    auto           whichever is faster where both can be had, and otherwise nccl

On CPU gloo carries them, and in an emulated cluster its link.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from platform import node
from statistics import median
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.constants import default_pg_timeout

from lightning_dhellam.parallel.collectives import exchange, largest, of_all_ranks
from lightning_dhellam.parallel.communicator import Communicator
from lightning_dhellam.parallel.copy_engine import (
    Memory,
    SharedMemoryTransport,
    open_memory,
    own_memory,
    piece_of,
)
from lightning_dhellam.parallel.overdue import Overdue
from lightning_dhellam.parallel.stand_in import is_emulated
from lightning_dhellam.plan import Lane

AUTO, NCCL, COPY_ENGINE = "auto", "nccl", "copy_engine"
TRANSPORTS = (AUTO, NCCL, COPY_ENGINE)
"""What users may ask for."""
CROSSING = 16 << 20
"""Bytes that are measured where it is not known what a rank hands on at a time."""


class _Lane(NamedTuple):
    """How a lane is spelt: who is on it, and by which argument its transport is asked for."""

    argument: str
    ranks: str


_LANES = {
    Lane.CP: _Lane("context_transport", "the GPUs that share sequences"),
    Lane.PP: _Lane("pipeline_transport", "the stages of a pipeline"),
}
_MOST = 64 << 20
"""Bytes beyond which only the bandwidth counts."""
_WARM, _TIMED = 2, 7
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def check_transport(
    lane: Lane, name: str, device: str | None = None, *, emulated: bool = False
) -> None:
    """Refuse a transport that there is not, or not on such a device.

    Args:
        lane: that it is asked for.
        name: as asked for.
        device: the type of device, once it is known.
        emulated: whether a link is played in its place.

    Raises:
        ValueError: with the ones that there are.
    """
    argument = _LANES[lane].argument
    if name not in TRANSPORTS:
        known = ", ".join(TRANSPORTS)
        raise ValueError(f"{argument}={name!r} is not known: use one of {known}")
    if name == AUTO:
        return
    if emulated:
        raise ValueError(
            f"{argument}='{name}' carries nothing under emulate=..., where the link '{lane}'"
            f" says how long exchanges take: leave it at '{AUTO}'"
        )
    if device not in (None, "cuda"):
        raise ValueError(
            f"{argument}='{name}' works between GPUs, but the device is '{device}': leave"
            f" it at '{AUTO}'"
        )


def choose_transport(
    name: str,
    on: Communicator,
    device: torch.device,
    world: ProcessGroup | None,
    crossing: int = CROSSING,
    parts: int = 1,
    timeout: timedelta = default_pg_timeout,
) -> tuple[Communicator, str]:
    """What carries the exchanges of a lane, the same on all ranks, and why.

    Every rank of `world` must call this.

    Args:
        name: one of `TRANSPORTS`.
        on: the lane, by its process group.
        device: of this rank.
        world: all ranks.
        crossing: bytes that a rank hands on at a time, which `auto` measures.
        parts: of the memory by which copy engines do it.
        timeout: after which this process ends if its device waits for another rank's.

    Raises:
        ValueError: copy engines were asked for and cannot be had, on every rank.
    """
    if on.size == 1 or device.type != "cuda" or is_emulated():
        return on, ""
    if name == NCCL:
        return on, NCCL
    opened, obstacle = _open(on, device, world, piece_of(crossing), parts, timeout)
    if opened is None:
        if name == AUTO:
            return on, f"{NCCL}, since {obstacle}"
        raise ValueError(
            f"{_LANES[on.lane].argument}='{COPY_ENGINE}' cannot be had, since {obstacle}: use"
            f" '{AUTO}' or '{NCCL}'"
        )
    if name == COPY_ENGINE:
        return opened, COPY_ENGINE
    crossing = min(max(crossing, 1), _MOST)
    x = torch.zeros(crossing, dtype=torch.uint8, device=device)
    chosen, seconds = fastest({COPY_ENGINE: opened, NCCL: on}, lambda each: _time(each, x), world)
    said = " and ".join(f"{seconds[one] * 1e3:.2f} ms by {one}" for one in seconds)
    carrier = opened if chosen == COPY_ENGINE else on
    return carrier, f"{chosen}: an exchange of {crossing / 2**20:.1f} MiB takes {said}"


def fastest(
    carriers: Mapping[str, Communicator],
    seconds: Callable[[Communicator], float],
    world: ProcessGroup | None,
) -> tuple[str, dict[str, float]]:
    """The name of the carrier whose slowest rank is the fastest, and what each one's took.

    It is the same on all ranks, whatever each of them has measured: of equals the first.
    """
    mine = torch.tensor([seconds(each) for each in carriers.values()], dtype=torch.float64)
    times = dict(zip(carriers, largest(mine, world).tolist(), strict=True))
    return min(times, key=times.__getitem__), times


def _open(
    on: Communicator,
    device: torch.device,
    world: ProcessGroup | None,
    piece: int,
    parts: int,
    timeout: timedelta,
) -> tuple[Communicator | None, str]:
    """The lane by copy engine, or why no rank has it. Every rank of `world` must call this."""
    own: Tensor | None = None
    memory: Memory | None = None
    obstacle = ""
    if len(set(of_all_ranks(_host(), on.group))) > 1:
        obstacle = f"{_LANES[on.lane].ranks} are on several hosts"
    else:
        try:
            own = own_memory(device, piece, parts)
        except Exception as error:
            obstacle = _not_shared(error)
    # Nobody may open what another rank has no room for, since all of a group open it together.
    obstacle = _of_any(obstacle, world)
    if obstacle or own is None:
        return None, obstacle
    try:
        memory = open_memory(own, on.group)
    except Exception as error:
        obstacle = _not_shared(error)
    # Nor may anybody wait for signals of a rank that has none.
    obstacle = _of_any(obstacle, world)
    if obstacle or memory is None:
        return None, obstacle
    transport = SharedMemoryTransport(
        memory,
        on.rank,
        on.transport,
        piece,
        overdue=Overdue(timeout, f"rank {dist.get_rank()}", _remedy(on.lane)),
        way=f"the {on.lane} lane",
        ranks=dist.get_process_group_ranks(on.group),
    )
    opened = replace(on, transport=transport)
    obstacle = _of_any(_wrong(opened, device), world)
    return (None, obstacle) if obstacle else (opened, "")


def _remedy(lane: Lane) -> str:
    return f", or {_LANES[lane].argument}='{NCCL}', which waits in other ways"


def _not_shared(error: Exception) -> str:
    """Says so, whatever this torch, driver or GPU has made of it."""
    return f"memory cannot be shared ({(str(error) or repr(error)).splitlines()[0]})"


def _of_any(text: str, world: ProcessGroup | None) -> str:
    """The first text of a rank that has one."""
    return next((each for each in of_all_ranks(text, world) if each), "")


def _host() -> str:
    """What tells this machine from others."""
    return _BOOT.read_text().strip() if _BOOT.exists() else node()


def _wrong(on: Communicator, device: torch.device) -> str:
    """Says so if other bytes arrive than were sent, as where a host cuts GPUs off."""
    sent = torch.full((1 << 20,), on.rank + 1, dtype=torch.uint8, device=device)
    got: Tensor = _pass_on(on, sent)
    right = bool((got == (on.rank - 1) % on.size + 1).all())
    return "" if right else "what GPUs read of each other's memory is wrong"


def _pass_on(on: Communicator, x: Tensor) -> Tensor:
    target, source = (on.rank + 1) % on.size, (on.rank - 1) % on.size
    got: Tensor = exchange(on, x, target=target, source=source).value
    return got


def _time(on: Communicator, x: Tensor) -> float:
    """Seconds of an exchange around the ring: the median of several, on this rank's device."""
    moments = []
    for _ in range(_WARM + _TIMED):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        _pass_on(on, x)
        end.record()
        moments.append((start, end))
    torch.cuda.synchronize(x.device)
    return median(start.elapsed_time(end) for start, end in moments[_WARM:]) / 1e3
