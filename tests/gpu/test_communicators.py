"""Collectives of NCCL between two GPUs, on every lane, and the multiprocessors that they take."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.collectives import (
    all_gather,
    all_to_all,
    exchange,
    receive,
    reduce_scatter,
    send,
)
from lightning_dhellam.parallel.communicator import Communicator
from lightning_dhellam.parallel.transport import GroupTransport
from lightning_dhellam.plan import Collective, Lane
from tests.gpu.test_several import needs
from tests.parallel.test_collectives import dispatched, gathered_together, passed_on
from tests.ranks import run_ranks

pytestmark = pytest.mark.gpu

SIZES = {
    Lane.TP: {"tensor_parallel_size": 2},
    Lane.CP: {"context_parallel_size": 2},
    Lane.EP: {"expert_parallel_size": 2},
}


def _communicator(rank: int, lane: Lane) -> tuple[ParallelContext, Communicator]:
    context = ParallelContext.create(torch.device("cuda", rank), **SIZES[lane])
    return context, context.communicators[lane]


def _all(rank: int, lane: Lane) -> bool:
    context, on = _communicator(rank, lane)
    stream = torch.cuda.Stream(priority=-1)
    with torch.cuda.stream(stream):
        for each in (dispatched, passed_on, gathered_together):
            each(on, "cuda")
    stream.synchronize()
    context.destroy()
    return isinstance(on.transport, GroupTransport)


@pytest.mark.parametrize("lane", SIZES)
def test_every_collective_brings_what_it_should(lane: Lane) -> None:
    needs(2)
    assert run_ranks(2, _all, lane, backend="nccl") == [True, True]


def _processors(rank: int, lane: Lane, folder: str) -> dict[str, tuple[int, int]]:
    """By collective, the multiprocessors of its kernels, and what the communicator says."""
    context, on = _communicator(rank, lane)
    other = 1 - rank
    x = torch.ones(2, 32 << 20, device="cuda", dtype=torch.bfloat16)
    rows = {"given": [1, 1], "taken": [1, 1]}
    edge = GroupTransport(on.group, lane, one_way=True)

    def one_way() -> Any:
        return send(x, other, edge) if rank == 0 else receive(x, other, edge)

    launches: dict[Collective, Callable[[], Any]] = {
        Collective.ALL_GATHER: lambda: all_gather(on, x),
        Collective.REDUCE_SCATTER: lambda: reduce_scatter(on, x),
        Collective.ALL_REDUCE: lambda: dist.all_reduce(x, group=on.group),
        Collective.ALL_TO_ALL: lambda: all_to_all(on, x, **rows),
        Collective.EXCHANGE: lambda: exchange(on, x, target=other, source=other),
        Collective.SEND: one_way,
    }
    found = {}
    for collective, launch in launches.items():
        for _ in range(2):
            launch()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
            launch()
            torch.cuda.synchronize()
        path = Path(folder) / f"{rank}-{collective}.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
        grids = [
            event["args"]["grid"][0]
            for event in events
            if event.get("cat") == "kernel" and "nccl" in event["name"]
        ]
        found[str(collective)] = (max(grids, default=0), on.processors(collective))
    context.destroy()
    return found


@pytest.mark.parametrize("lane", SIZES)
def test_a_collective_takes_no_more_processors_than_is_said(lane: Lane, tmp_path: Path) -> None:
    """A GEMM leaves so many free, and a machine model counts on it."""
    needs(2)
    for found in run_ranks(2, _processors, lane, str(tmp_path), backend="nccl"):
        print(lane, found)
        for collective, (taken, said) in found.items():
            assert 0 < taken <= said, (collective, found)
