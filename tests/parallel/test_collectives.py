"""The collectives of gloo: whole results, in an order of addition that is always the same."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dhellam.parallel.collectives import all_gather, reduce_scatter
from tests.ranks import run_ranks

ROWS, WIDTH = 3, 5


def _part(rank: int, ranks: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(ranks * ROWS, WIDTH, generator=generator).to(dtype)


def _scattered(rank: int, ranks: int, dtype: torch.dtype, transposed: bool) -> dict[str, Any]:
    whole = _part(rank, ranks, dtype)
    if transposed:
        whole = whole.t().contiguous().t()
        assert not whole.is_contiguous()
    before = whole.clone()
    pending = reduce_scatter(whole, dist.group.WORLD)
    assert pending.work is not None and not pending.work.is_completed()
    waiting = [threading.Thread(target=pending.work.wait) for _ in range(3)]
    for thread in waiting:
        thread.start()
    for thread in waiting:
        thread.join()
    pending.work.wait()
    gathered = all_gather(pending.value, dist.group.WORLD)
    gathered.work.wait()
    return {
        "mine": pending.value,
        "all": gathered.value,
        "completed": pending.work.is_completed(),
        "kept": torch.equal(whole, before),
    }


@pytest.mark.parametrize(
    ("ranks", "dtype", "transposed"),
    [
        (1, torch.float32, False),
        (2, torch.bfloat16, True),
        (3, torch.float32, True),
        (3, torch.bfloat16, False),
    ],
)
def test_a_sum_over_ranks_is_the_same_everywhere(
    ranks: int, dtype: torch.dtype, transposed: bool
) -> None:
    parts = torch.stack([_part(rank, ranks, dtype) for rank in range(ranks)])
    expected = parts.sum(0)
    for rank, found in enumerate(run_ranks(ranks, _scattered, ranks, dtype, transposed)):
        assert torch.equal(found["mine"], expected[rank * ROWS : (rank + 1) * ROWS])
        assert torch.equal(found["all"], expected)
        assert found["completed"] and found["kept"]
