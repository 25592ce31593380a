"""ParallelContext: its groups and its place are those that were asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

import lightning_dhellam
from lightning_dhellam.parallel import ParallelContext, Topology
from lightning_dhellam.parallel.duplex import Duplex
from lightning_dhellam.parallel.transport import Alone, GroupTransport
from lightning_dhellam.plan import Lane
from tests.ranks import run_ranks

CPU = torch.device("cpu")


def test_megatron_may_ask_one_process_for_its_rank() -> None:
    assert not dist.is_initialized()
    with ParallelContext.single(CPU).megatron():
        assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match="not been initialized"):
        dist.get_rank()


def _ranks_of_context(rank: int) -> tuple[int, ...]:
    with pytest.raises(ValueError, match="tensor_parallel_size=3"):
        ParallelContext.create(CPU, tensor_parallel_size=3)
    context = ParallelContext.create(CPU, tensor_parallel_size=2)
    assert (context.topology.rank, context.topology.world_size) == (rank, 4)
    tensor, data = (context.communicators[lane] for lane in (Lane.TP, Lane.DP))
    assert tensor.group is context.groups.tp and data.group is context.groups.dp
    assert (tensor.rank, tensor.size, data.rank, data.size) == (rank % 2, 2, rank // 2, 2)
    assert isinstance(tensor.transport, Duplex) and isinstance(data.transport, GroupTransport)
    assert isinstance(context.communicators[Lane.CP].transport, Alone)
    total = torch.tensor([float(10**rank)])
    dist.all_reduce(total, group=context.groups.tp)
    single = ParallelContext.single(CPU)
    assert single.topology == Topology() and single.groups.dp.size() == 1
    alone = torch.tensor([float(rank)])
    dist.all_reduce(alone, group=single.groups.tp)
    assert alone.item() == rank
    context.destroy()
    assert not parallel_state.is_initialized()
    return (
        context.topology.tp_rank,
        context.topology.tp_size,
        context.topology.dp_rank,
        context.topology.dp_size,
        context.topology.pp_size,
        context.topology.cp_size,
        context.topology.ep_size,
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
    assert not dist.is_initialized()
    assert all(each.size == 1 for each in context.communicators.values())
    assert (
        context.topology.rank,
        context.topology.world_size,
        context.topology.tp_size,
        context.topology.dp_size,
    ) == (0, 1, 1, 1)
    assert (context.groups.tp.rank(), context.groups.tp.size()) == (0, 1)
    with pytest.raises(ZeroDivisionError), context.megatron():
        _ = 1 / 0
    assert not dist.is_initialized()


def test_megatrons_global_state_is_read_in_one_place() -> None:
    package = Path(lightning_dhellam.__file__).parent
    readers = [file for file in package.rglob("*.py") if "parallel_state" in file.read_text()]
    assert [str(file.relative_to(package)) for file in readers] == ["parallel/groups.py"]
