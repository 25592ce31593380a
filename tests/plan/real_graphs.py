"""Graphs of a real model for any tensor-parallel size, in one process: to look at, not to run."""

from __future__ import annotations

from copy import copy
from dataclasses import replace

import torch
from torch.distributed import ProcessGroup

from lightning_dhellam.layers import Lowered, lower
from lightning_dhellam.models import CausalLM, ModelConfig
from lightning_dhellam.parallel import ParallelContext, Topology
from lightning_dhellam.parallel.communicator import Communicator
from lightning_dhellam.parallel.groups import OpenGroups
from lightning_dhellam.parallel.transport import Alone
from lightning_dhellam.plan import Lane
from tests.models.llama import SMALL


def context_of_rank_0(tensor_parallel_size: int) -> ParallelContext:
    """Rank 0 of so many tensor ranks, with a group that cannot communicate."""
    context = ParallelContext.single(torch.device("cpu"))
    if tensor_parallel_size == 1:
        return context
    group = ProcessGroup(0, tensor_parallel_size)  # type: ignore[call-arg]
    groups = copy(context.groups)
    groups.tp = group
    topology = Topology(world_size=tensor_parallel_size, tp_size=tensor_parallel_size)
    tensor = Communicator(Lane.TP, group, Alone(), 0, tensor_parallel_size)
    return replace(
        context,
        topology=topology,
        megatron_groups=OpenGroups(groups),
        communicators={**context.communicators, Lane.TP: tensor},
    )


def lowered(
    tensor_parallel_size: int,
    config: ModelConfig = SMALL,
    dtype: torch.dtype = torch.float32,
    regather: bool = True,
) -> Lowered:
    """The graphs that rank 0 of `tensor_parallel_size` ranks has."""
    model = CausalLM(config, context_of_rank_0(tensor_parallel_size), dtype)
    return lower(model, regather=regather)
