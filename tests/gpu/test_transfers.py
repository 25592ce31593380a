"""Two GPUs as stages of a pipeline: what copy engines pull is what NCCL brings."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from lightning_dhellam.kernels.deterministic import prepare
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.collectives import receive, send
from lightning_dhellam.parallel.copy_engine import PIECE, SharedMemoryTransport
from lightning_dhellam.plan import Lane, Strand
from tests.gpu.test_several import needs
from tests.pipeline.test_transfers import wrong_by
from tests.ranks import run_ranks

pytestmark = pytest.mark.gpu

MESSAGES = 5


def _context(device: torch.device, transport: str, size: int = PIECE) -> ParallelContext:
    return ParallelContext.create(
        device,
        pipeline_parallel_size=2,
        pipeline_transport=transport,
        crossing={Lane.PP: size},
    )


def _every_schedule(rank: int) -> dict[str, Any]:
    prepare()
    torch.use_deterministic_algorithms(True)
    device = torch.device("cuda", rank)
    by_nccl = _context(device, "nccl")
    by_nccl.destroy()  # for Megatron-core, which knows one set of groups at a time
    # In turns of a few KiB, so that a message needs many.
    pulled = _context(device, "copy_engine", 2048)
    assert all(isinstance(one, SharedMemoryTransport) for one in pulled.edges.values())
    return {"wrong": wrong_by(by_nccl, pulled, torch.bfloat16), "carried": dict(pulled.carried)}


def test_no_transport_and_no_schedule_changes_a_bit() -> None:
    needs(2)
    for found in run_ranks(2, _every_schedule, backend="nccl", timeout=300):
        assert found == {"wrong": [], "carried": {Lane.PP: "copy_engine"}}


def _both_ways(rank: int, context: ParallelContext, size: int) -> tuple[bool, bool, float]:
    """Whether messages that cross on both edges arrive, whether the host waits, and their GB/s."""
    device, other = context.device, 1 - rank
    there, back = Strand.FORWARD, Strand.BACKWARD
    strands = (there, back) if rank == 0 else (back, there)
    out_edge = context.edges[rank, other, strands[0]]  # type: ignore[index]
    in_edge = context.edges[other, rank, strands[1]]  # type: ignore[index]
    sent = [torch.arange(size // 8, device=device) + 10 * rank + i for i in range(MESSAGES)]
    got = [torch.empty_like(x) for x in sent]
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    moments: list[torch.cuda.Event] = []

    def cross(count: int) -> None:
        for stream in streams:
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(streams[0]):
            for x in sent[:count]:
                send(x, other, out_edge)
        with torch.cuda.stream(streams[1]):
            for out in got[:count]:
                moments.append(torch.cuda.Event(enable_timing=True))
                moments[-1].record()
                receive(out, other, in_edge)
            moments.append(torch.cuda.Event(enable_timing=True))
            moments[-1].record()

    cross(1)  # loads the kernels
    torch.cuda.synchronize()
    moments.clear()
    torch.cuda._sleep(int(1e9))
    torch.cuda.set_sync_debug_mode("error")
    cross(MESSAGES)
    waits = moments[-1].query()
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    right = all(torch.equal(y, x - 10 * rank + 10 * other) for x, y in zip(sent, got, strict=True))
    seconds = moments[1].elapsed_time(moments[-1]) / 1e3
    return right, waits, (MESSAGES - 1) * size / seconds / 1e9


def _transfers(rank: int) -> dict[str, Any]:
    device = torch.device("cuda", rank)
    found: dict[str, Any] = {}
    for name in ("nccl", "copy_engine", "auto"):
        context = _context(device, name, 4 * PIECE)
        assert len(context.edges) == 4
        found[name] = (*_both_ways(rank, context, 4 * PIECE), dict(context.carried))
        context.destroy()
    return found


def test_large_messages_cross_both_ways_and_no_host_waits() -> None:
    needs(2)
    first, second = run_ranks(2, _transfers, backend="nccl", timeout=240)
    for name, (right, waits, rate, carried) in first.items():
        print(f"{name}: {rate:.0f} and {second[name][2]:.0f} GB/s, {carried}")
        assert right and second[name][0] and not waits and not second[name][1]
        assert carried == second[name][3]
    times = r"an exchange of [\d.]+ MiB takes [\d.]+ ms by copy_engine and [\d.]+ ms by nccl"
    assert re.fullmatch(f"(nccl|copy_engine): {times}", first["auto"][3][Lane.PP])
