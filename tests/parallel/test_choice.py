"""What carries exchanges is the same on all ranks, whatever each of them finds. GPUs: tests/gpu."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_dhellam.parallel import ParallelContext, choice
from lightning_dhellam.parallel.choice import choose_transport, fastest
from lightning_dhellam.parallel.duplex import Duplex
from lightning_dhellam.plan import Lane
from tests.ranks import run_ranks


def _found(rank: int) -> dict[str, Any]:
    context = ParallelContext.create(torch.device("cpu"), context_parallel_size=2)
    on, world = context.communicators[Lane.CP], dist.group.WORLD
    assert isinstance(on.transport, Duplex) and context.carried == {}
    gpu = torch.device("cuda", rank)
    assert choose_transport("nccl", on, gpu, world) == (on, "nccl")
    # Where one rank alone cannot: as if it had no room, its memory could not be seen, or it stood
    # elsewhere. What one has no room for none opens, which all of a group would do together.
    opened: list[None] = []

    def no_room(*_: Any) -> Any:
        if rank == 1:
            raise torch.cuda.OutOfMemoryError("no room")

    choice.own_memory = no_room
    choice.open_memory = lambda *_: opened.append(None)  # type: ignore[assignment]
    found: dict[str, Any] = {"full": choose_transport("auto", on, gpu, world)[1]}
    assert not opened
    choice.own_memory = lambda *_: torch.zeros(1)
    choice.open_memory = lambda *_: 1 / rank  # type: ignore[assignment]
    found["unseen"] = choose_transport("auto", on, gpu, world)[1]
    choice._host = lambda: str(rank)
    found["apart"] = choose_transport("auto", on, gpu, world)[1]
    with pytest.raises(ValueError) as refused:
        choose_transport("copy_engine", on, gpu, world)
    found["refused"] = str(refused.value)
    # Each rank is fast with another one; the first is slower where it is slowest.
    seconds = {"first": (1.0, 5.0), "second": (4.0, 2.0)}
    carriers = dict.fromkeys(seconds, on)
    mine = iter([times[rank] for times in seconds.values()])
    found["fastest"] = fastest(carriers, lambda each: next(mine), world)
    return found


def test_ranks_agree_on_what_carries_exchanges() -> None:
    first, second = run_ranks(2, _found)
    assert first == second
    assert first["fastest"] == ("second", {"first": 5.0, "second": 4.0})
    assert first["full"] == "nccl, since memory cannot be shared (no room)"
    assert first["unseen"] == "nccl, since memory cannot be shared (division by zero)"
    assert first["apart"] == "nccl, since the GPUs that share sequences are on several hosts"
    assert first["refused"] == (
        "context_transport='copy_engine' cannot be had, since the GPUs that share sequences are on"
        " several hosts: use 'auto' or 'nccl'"
    )
