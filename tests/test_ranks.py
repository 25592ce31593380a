"""The test launcher itself: results, errors, time-outs."""

from __future__ import annotations

import multiprocessing
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.ranks import RankTraceback, run_ranks


def _sum_over_ranks(rank: int, offset: int) -> dict[str, torch.Tensor]:
    value = torch.tensor([rank + offset])
    dist.all_reduce(value)
    return {"sum": value, "threads": torch.tensor(torch.get_num_threads())}


def _do_nothing(rank: int) -> int:
    return rank


def _fail_on_the_last(rank: int) -> None:
    if rank == dist.get_world_size() - 1:
        raise KeyError("the cause")
    dist.barrier()


def _hang(rank: int) -> None:
    time.sleep(600 if rank == 1 else 0)


def _listening(rank: int) -> list[float]:
    """Threads that listen for groups, while there are four; and what came over the last."""
    groups = [dist.new_group() for _ in range(3)]
    value = torch.tensor([rank + 1.0])
    dist.all_reduce(value, group=groups[-1])
    tasks = Path("/proc/self/task").glob("*/comm")
    return [sum("gloo_tcp" in task.read_text() for task in tasks), value.item()]


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_one_thread_listens_for_all_groups() -> None:
    assert run_ranks(2, _listening) == [[1, 3.0]] * 2


@pytest.mark.parametrize("world_size", [1, 2])
def test_results_come_in_rank_order(world_size: int) -> None:
    results = run_ranks(world_size, _sum_over_ranks, 5)
    assert [result["sum"].item() for result in results] == [sum(range(5, 5 + world_size))] * (
        world_size
    )
    assert all(result["threads"].item() == 1 for result in results)


def test_ranks_that_do_nothing_wait_until_all_are_connected() -> None:
    assert run_ranks(4, _do_nothing) == [0, 1, 2, 3]


def test_the_first_error_is_raised_with_the_ranks_traceback() -> None:
    with pytest.raises(KeyError, match="the cause") as error:
        run_ranks(2, _fail_on_the_last)
    assert isinstance(error.value.__cause__, RankTraceback)
    assert "[rank 1]" in str(error.value.__cause__)
    assert "_fail_on_the_last" in str(error.value.__cause__)
    assert not multiprocessing.active_children()


def test_a_time_out_names_the_ranks_and_ends_them() -> None:
    with pytest.raises(TimeoutError, match=r"ranks \[1\]"):
        run_ranks(2, _hang, timeout=2)
    assert not multiprocessing.active_children()
