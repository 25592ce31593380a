"""The collectives of gloo: whole results, in an order of addition that is always the same."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_dhellam.parallel import Topology
from lightning_dhellam.parallel.collectives import (
    Pending,
    all_gather,
    all_to_all,
    exchange,
    reduce_scatter,
)
from lightning_dhellam.parallel.communicator import Communicator
from lightning_dhellam.parallel.duplex import Duplex, open_duplex
from lightning_dhellam.parallel.transport import Alone, GroupTransport, Transport
from lightning_dhellam.parallel.work import Once
from lightning_dhellam.plan import Collective, Lane
from tests.ranks import run_ranks

ROWS, WIDTH = 3, 5


def _part(rank: int, ranks: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(ranks * ROWS, WIDTH, generator=generator).to(dtype)


def communicator(transport: Transport | None = None) -> Communicator:
    """Of all ranks, by gloo itself if no transport is given."""
    group = dist.group.WORLD
    assert group is not None
    transport = transport or GroupTransport(group, Lane.TP)
    return Communicator(Lane.TP, group, transport, group.rank(), group.size())


def duplex(seconds: float = 30) -> Duplex:
    """Connections of all ranks."""
    ranks = dist.get_world_size()
    topology = Topology(ranks, dist.get_rank(), tp_size=ranks)
    opened = open_duplex(topology, Lane.TP, timedelta(seconds=seconds))
    assert opened is not None
    return opened


def _scattered(
    rank: int, ranks: int, dtype: torch.dtype, transposed: bool, by_duplex: bool
) -> dict[str, Any]:
    whole = _part(rank, ranks, dtype)
    if transposed:
        whole = whole.t().contiguous().t()
        assert not whole.is_contiguous()
    before = whole.clone()
    on = communicator(duplex() if by_duplex else None)
    # Several are on their way at once, and are waited for in any order.
    others = [reduce_scatter(on, whole + number) for number in range(3)]
    pending = reduce_scatter(on, whole)
    assert pending.work is not None and not (by_duplex and pending.work.is_completed())
    waiting = [threading.Thread(target=pending.work.wait) for _ in range(3 if by_duplex else 1)]
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join()
    if by_duplex:
        pending.work.wait()
    gathered = all_gather(on, pending.value)
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
    on = communicator(duplex(3))
    store = dist.distributed_c10d._get_default_store()
    if rank == 1:
        store.wait(["late"])
        return ""
    work = all_gather(on, torch.ones(2)).work
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
    opened = open_duplex(topology, Lane.TP, timedelta(seconds=30))
    assert opened is not None
    on = Communicator(Lane.TP, group, opened, group.rank(), group.size())
    gathered = all_gather(on, torch.tensor([float(rank)]))
    assert gathered.work is not None
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


DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn)


def rows_of(rank: int, dtype: torch.dtype, count: int, width: tuple[int, ...] = (3,)) -> Tensor:
    """Rows that tell whose they are, in numbers that every type has."""
    numbers = torch.arange(count * max(1, width[0] if width else 1)) + 3 * rank
    return (numbers % 7).float().to(dtype).view(count, *width)


def sizes(rank: int, ranks: int) -> list[int]:
    """Rows from `rank` for each rank: uneven, and none from rank 0 and for the last one."""
    return [0 if rank == 0 or to == ranks - 1 else 2 * rank + to for to in range(ranks)]


def received(pending: Pending) -> tuple[Tensor, ...]:
    """What arrives, once it has."""
    if pending.work is not None:
        pending.work.wait()
    value: Tensor | tuple[Tensor, ...] = pending.value
    return value if isinstance(value, tuple) else (value,)


def dispatched(on: Communicator, device: str = "cpu") -> None:
    """Rows of several types are dealt out together, several times at once, and come back."""
    rank, ranks = on.rank, on.size
    given = sizes(rank, ranks)
    taken = [sizes(other, ranks)[rank] for other in range(ranks)]
    whole = [rows_of(rank, dtype, sum(given)).to(device) for dtype in DTYPES]
    whole.append(rows_of(rank, torch.float32, sum(given), ()).to(device))
    before = [x.clone() for x in whole]
    other = all_to_all(on, whole[0] + 1, given=given, taken=taken)
    there = received(all_to_all(on, *whole, given=given, taken=taken))
    for x, sent in zip(there, whole, strict=True):
        parts = [
            rows_of(source, x.dtype, sum(sizes(source, ranks)), tuple(sent.shape[1:])).split(
                sizes(source, ranks)
            )[rank]
            for source in range(ranks)
        ]
        assert torch.equal(x.cpu().float(), torch.cat(parts).float()), (x.dtype, rank)
    (shifted,) = received(other)
    assert torch.equal(shifted, there[0] + 1)
    back = received(all_to_all(on, *there, given=taken, taken=given))
    for x, sent, kept in zip(back, whole, before, strict=True):
        assert torch.equal(x.float(), sent.float()) and torch.equal(sent.float(), kept.float())


def passed_on(on: Communicator, device: str = "cpu") -> None:
    """Tensors go round the ring, uneven and empty ones too, until they are where they began."""
    rank, ranks = on.rank, on.size
    target, source = (rank + 1) % ranks, (rank - 1) % ranks
    keys, values = (rows_of(rank, dtype, 4).to(device) for dtype in (torch.float32, torch.int64))
    at: tuple[Tensor, ...] = (keys, values[:, :2])
    assert ranks == 1 or not at[1].is_contiguous()
    for step in range(1, ranks + 1):
        at = received(exchange(on, *at, target=target, source=source))
        owner = (rank - step) % ranks
        assert torch.equal(at[0].cpu(), rows_of(owner, torch.float32, 4))
        assert torch.equal(at[1].cpu(), rows_of(owner, torch.int64, 4)[:, :2])
    uneven = rows_of(rank, torch.float32, rank).to(device)
    nothing = torch.empty(0, 2, device=device)
    pending = exchange(
        on, uneven, nothing, target=target, source=source, rows=[(rank - 1) % ranks, 0]
    )
    got, none = received(pending)
    assert torch.equal(got.cpu(), rows_of(source, torch.float32, source))
    assert none.shape == (0, 2)


def gathered_together(on: Communicator, device: str = "cpu") -> None:
    """Several tensors in one collective."""
    rank, ranks = on.rank, on.size
    given = [torch.full((2, 3), 1.0 + rank), torch.tensor([rank])]
    ones, numbers = received(all_gather(on, *(x.to(device) for x in given)))
    assert numbers.tolist() == list(range(ranks)) and ones.shape == (2 * ranks, 3)
    assert ones[:, 0].tolist() == [1.0 + r for r in range(ranks) for _ in range(2)]
    first, second = received(reduce_scatter(on, ones, 2 * ones))
    assert torch.equal(second, 2 * first) and first.sum() == 6 * ranks * (rank + 1)


def _all(rank: int, by_duplex: bool) -> int:
    on = communicator(duplex() if by_duplex else None)
    with torch.enable_grad():
        for each in (dispatched, passed_on, gathered_together):
            each(on)
        x = torch.ones(2, requires_grad=True)
        assert not received(all_gather(on, x))[0].requires_grad
    assert on.processors(Collective.ALL_TO_ALL) == 0
    return max(on.processors(collective) for collective in Collective)


@pytest.mark.parametrize(("ranks", "by_duplex"), [(2, False), (2, True), (3, True), (4, True)])
def test_every_collective_brings_what_it_should(ranks: int, by_duplex: bool) -> None:
    assert run_ranks(ranks, _all, by_duplex) == [0] * ranks


def test_a_rank_alone_receives_what_it_sends() -> None:
    group = ProcessGroup(0, 1)  # type: ignore[call-arg]
    on = Communicator(Lane.CP, group, Alone(), 0, 1)
    for each in (dispatched, passed_on, gathered_together):
        each(on)


@pytest.mark.parametrize(
    ("given", "taken", "message"),
    [
        ([2, 1], [3], r"given=\[2, 1\] must be a number of rows for each of the 1 ranks of the ep"),
        ([2], [3, 1], r"taken=\[3, 1\] must be a number of rows for each"),
        ([-1], [3], r"given=\[-1\] must be a number of rows"),
        ([2], [2], r"given=\[2\] are 2 rows, but a tensor has 3"),
    ],
)
def test_rows_that_do_not_add_up_are_refused(
    given: list[int], taken: list[int], message: str
) -> None:
    on = Communicator(Lane.EP, ProcessGroup(0, 1), Alone(), 0, 1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=message):
        all_to_all(on, torch.ones(3, 2), given=given, taken=taken)
