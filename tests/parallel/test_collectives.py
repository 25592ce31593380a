"""The collectives of gloo: whole results, in an order of addition that is always the same."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dhellam.parallel import Topology
from lightning_dhellam.parallel.collectives import all_gather, reduce_scatter
from lightning_dhellam.parallel.duplex import Duplex, open_duplex
from lightning_dhellam.parallel.work import Once
from tests.ranks import run_ranks

ROWS, WIDTH = 3, 5
CPU = torch.device("cpu")


def _part(rank: int, ranks: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(ranks * ROWS, WIDTH, generator=generator).to(dtype)


def _all_tensor_ranks() -> Topology:
    return Topology(dist.get_world_size(), dist.get_rank(), tp_size=dist.get_world_size())


def _duplex(seconds: float) -> Duplex:
    group = dist.group.WORLD
    assert group is not None
    opened = open_duplex(group, _all_tensor_ranks(), CPU, timedelta(seconds=seconds))
    assert opened is not None
    return opened


def _scattered(
    rank: int, ranks: int, dtype: torch.dtype, transposed: bool, duplex: bool
) -> dict[str, Any]:
    whole = _part(rank, ranks, dtype)
    if transposed:
        whole = whole.t().contiguous().t()
        assert not whole.is_contiguous()
    before = whole.clone()
    group = dist.group.WORLD
    assert group is not None
    transport = _duplex(30) if duplex else None
    # Several are on their way at once, and are waited for in any order.
    others = [reduce_scatter(whole + number, group, transport) for number in range(3)]
    pending = reduce_scatter(whole, group, transport)
    assert pending.work is not None and not (duplex and pending.work.is_completed())
    waiting = [threading.Thread(target=pending.work.wait) for _ in range(3 if duplex else 1)]
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join()
    if duplex:
        pending.work.wait()
    gathered = all_gather(pending.value, group, transport)
    for one in (gathered, *reversed(others)):
        assert one.work is not None
        one.work.wait()
    return {
        "mine": pending.value,
        "all": gathered.value,
        "others": [one.value for one in others],
        "completed": pending.work.is_completed(),
        "kept": torch.equal(whole, before),
    }


@pytest.mark.parametrize(
    ("ranks", "dtype", "transposed", "duplex"),
    [
        (1, torch.float32, False, False),
        (2, torch.float32, True, False),
        (2, torch.bfloat16, True, True),
        (3, torch.float32, True, True),
        (3, torch.bfloat16, False, True),
    ],
)
def test_a_sum_over_ranks_is_the_same_everywhere(
    ranks: int, dtype: torch.dtype, transposed: bool, duplex: bool
) -> None:
    parts = torch.stack([_part(rank, ranks, dtype) for rank in range(ranks)])
    expected = parts.sum(0)
    job = (ranks, _scattered, ranks, dtype, transposed, duplex)
    for rank, found in enumerate(run_ranks(*job)):
        own = slice(rank * ROWS, (rank + 1) * ROWS)
        assert torch.equal(found["mine"], expected[own])
        assert torch.equal(found["all"], expected)
        for number, other in enumerate(found["others"]):
            assert torch.equal(other, (parts + number).sum(0)[own])
        assert found["kept"] and (found["completed"] or not duplex)


def _late(rank: int) -> str:
    group = dist.group.WORLD
    assert group is not None
    transport = _duplex(3)
    store = dist.distributed_c10d._get_default_store()
    if rank == 1:
        store.wait(["late"])
        return ""
    work = all_gather(torch.ones(2), group, transport).work
    assert work is not None
    with pytest.raises(RuntimeError) as failure:
        work.wait()
    store.set("late", "it was")
    return str(failure.value)


def test_a_collective_that_a_rank_does_not_join_fails() -> None:
    assert "imed out" in run_ranks(2, _late)[0]


def _of_pairs(rank: int) -> bool:
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    group = pairs[rank // 2]
    topology = Topology(4, rank, tp_size=2)
    duplex = open_duplex(group, topology, CPU, timedelta(seconds=30))
    gathered = all_gather(torch.tensor([float(rank)]), group, duplex)
    assert duplex is not None and gathered.work is not None
    gathered.work.wait()
    first = rank // 2 * 2
    return gathered.value.tolist() == [first, first + 1]


def test_every_group_of_ranks_has_connections_of_its_own() -> None:
    assert all(run_ranks(4, _of_pairs))


def test_work_that_failed_fails_for_all_who_wait_and_is_not_asked_again() -> None:
    asked = []

    class Fails:
        def wait(self) -> None:
            asked.append(self)
            if len(asked) == 2:
                raise RuntimeError("the other side is gone")

        def is_completed(self) -> bool:
            return False

    finished: list[bool] = []
    work = Once([Fails() for _ in range(3)], lambda: finished.append(True))
    assert not work.is_completed()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="the other side is gone"):
            work.wait()
    assert len(asked) == 2 and not finished and work.is_completed()


def test_work_is_not_completed_while_somebody_waits_for_it() -> None:
    begun, end = threading.Event(), threading.Event()

    class Slow:
        def wait(self) -> None:
            begun.set()
            assert end.wait(30)

        def is_completed(self) -> bool:
            return False

    work = Once([Slow()])
    waiting = threading.Thread(target=work.wait)
    waiting.start()
    assert begun.wait(30)
    early = work.is_completed()
    end.set()
    waiting.join()
    assert not early and work.is_completed()
