"""ParallelContext: sizes that do not fit are refused in the user's words; ranks land where said."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from lightning_dhellam.parallel import ParallelContext, check_sizes
from tests.ranks import run_ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("world_size", "sizes", "words"),
    [
        (4, {"tensor_parallel_size": 3}, ["tensor_parallel_size=3", "world size is 4", "devices"]),
        (
            8,
            {"tensor_parallel_size": 4, "pipeline_parallel_size": 4},
            ["tensor_parallel_size=4, pipeline_parallel_size=4", "multiple of 16"],
        ),
        (2, {"context_parallel_size": 4}, ["context_parallel_size=4", "world size is 2"]),
        (4, {"expert_parallel_size": 3}, ["expert_parallel_size=3", "world size 4"]),
        (4, {"tensor_parallel_size": 0}, ["tensor_parallel_size=0", "at least 1"]),
        (4, {"tensor_parallel_size": "2"}, ["tensor_parallel_size='2'", "integer"]),
    ],
)
def test_sizes_that_do_not_fit_are_refused(
    world_size: int, sizes: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        check_sizes(world_size, **sizes)
    for word in words:
        assert word in str(error.value)


def test_sizes_that_fit_are_accepted() -> None:
    check_sizes(1)
    check_sizes(8, 2, 2, 2, 1)
    check_sizes(8, 2, 1, 1, 4)


def _ranks_of_context(rank: int) -> tuple[int, ...]:
    with pytest.raises(ValueError, match="tensor_parallel_size=3"):
        ParallelContext.create(CPU, tensor_parallel_size=3)
    context = ParallelContext.create(CPU, tensor_parallel_size=2)
    assert (context.rank, context.world_size) == (rank, 4)
    assert context.tp_group is context.groups.tp and context.dp_group is context.groups.dp
    total = torch.tensor([float(10**rank)])
    dist.all_reduce(total, group=context.tp_group)
    single = ParallelContext.single(CPU)
    assert (single.tp_size, single.dp_size, single.rank) == (1, 1, rank)
    alone = torch.tensor([float(rank)])
    dist.all_reduce(alone, group=single.tp_group)
    assert alone.item() == rank
    context.destroy()
    assert not parallel_state.is_initialized()
    return (
        context.tp_rank,
        context.tp_size,
        context.dp_rank,
        context.dp_size,
        context.pp_size,
        context.cp_size,
        context.ep_size,
        int(total.item()),
    )


def test_tensor_ranks_are_adjacent_and_data_ranks_apart() -> None:
    assert run_ranks(4, _ranks_of_context) == [
        (0, 2, 0, 2, 1, 1, 1, 11),
        (1, 2, 0, 2, 1, 1, 1, 11),
        (0, 2, 1, 2, 1, 1, 1, 1100),
        (1, 2, 1, 2, 1, 1, 1, 1100),
    ]


def test_single_needs_no_torch_distributed() -> None:
    context = ParallelContext.single(CPU)
    assert not dist.is_initialized() and context.tp_group is None and context.dp_group is None
    assert (context.rank, context.world_size, context.tp_size, context.dp_size) == (0, 1, 1, 1)
    assert (context.groups.tp.rank(), context.groups.tp.size()) == (0, 1)
    with pytest.raises(ZeroDivisionError), context.megatron():
        _ = 1 / 0
    assert not dist.is_initialized()
