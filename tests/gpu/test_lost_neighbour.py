"""A GPU whose neighbour does not send, or was killed, does not wait for ever."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from lightning_dhellam.parallel import ParallelContext, presence
from lightning_dhellam.parallel.collectives import receive, send
from lightning_dhellam.parallel.overdue import Overdue
from lightning_dhellam.parallel.presence import presence_of_world
from lightning_dhellam.plan import Lane
from lightning_dhellam.plan.operator import Strand
from lightning_dhellam.plan.placement import Edge
from tests.gpu.test_several import needs
from tests.ranks import run_until_ended

pytestmark = pytest.mark.gpu

EDGE = Edge(0, 1, Strand.FORWARD)
LONG = timedelta(minutes=10)


def _on_stage(rank: int, folder: Path, timeout: timedelta, killed: bool) -> None:
    presence.GRACE = 2.0
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    if killed:
        found = presence_of_world(LONG)
        assert found is not None
        found.enter(1)
    context = ParallelContext.create(
        device,
        pipeline_parallel_size=2,
        timeout=timeout,
        pipeline_transport="copy_engine",
        crossing={Lane.PP: 1 << 20},
    )
    x = torch.full((1 << 18,), 7.0, device=device)
    if rank == 0:
        send(x, 1, context.edges[EDGE])
        torch.cuda.synchronize()
        while not (folder / "received").exists():
            time.sleep(0.01)
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)
        while not (folder / "said").exists() or not (folder / "said").read_text():
            time.sleep(0.01)
        os._exit(0)
    got = torch.zeros_like(x)
    receive(got, 0, context.edges[EDGE])
    torch.cuda.synchronize()
    assert torch.equal(got, x)
    os.dup2(os.open(folder / "said", os.O_CREAT | os.O_WRONLY), 2)
    (folder / "received").touch()
    receive(got, 0, context.edges[EDGE])
    torch.cuda.synchronize()  # inside of which the host waits, and its threads go on


def test_what_a_device_has_not_done_is_waited_for_until_it_has() -> None:
    needs(1)
    overdue = Overdue(timedelta(hours=1), "rank 0", end=lambda text: None)
    with overdue.watching("an edge", "rank 1", torch.device("cuda")):
        torch.cuda._sleep(int(2e9))
    assert "s for rank 1 on an edge, longer" in str(overdue.said(time.monotonic() + 3601))
    torch.cuda.synchronize()
    assert overdue.said(time.monotonic() + 9999) is None


def test_one_that_does_not_send(tmp_path: Path) -> None:
    needs(2)
    timeout = timedelta(seconds=30)
    assert run_until_ended(2, _on_stage, tmp_path, timeout, False, timeout=240, backend="nccl") == [
        0,
        1,
    ]
    said = (tmp_path / "said").read_text()
    assert f"s for rank 0 on edge {EDGE}, longer than the timeout of 0:00:30" in said


def test_one_that_was_killed(tmp_path: Path) -> None:
    needs(2)
    ends = run_until_ended(2, _on_stage, tmp_path, LONG, True, timeout=240, backend="nccl")
    assert ends == [-signal.SIGKILL, 1]
    assert "since it lost rank 0 (process" in (tmp_path / "said").read_text()
