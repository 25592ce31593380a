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
from lightning_dhellam.plan.passes import Recompute
from tests.models.llama import SMALL


def context_of_rank_0(tensor_parallel_size: int, context_parallel_size: int = 1) -> ParallelContext:
    """Rank 0 of so many ranks, with groups that cannot communicate."""
    context = ParallelContext.single(torch.device("cpu"))
    groups, communicators = copy(context.groups), dict(context.communicators)
    sizes = {Lane.TP: tensor_parallel_size, Lane.CP: context_parallel_size}
    for lane, size in sizes.items():
        if size > 1:
            group = ProcessGroup(0, size)  # type: ignore[call-arg]
            setattr(groups, lane.value, group)
            communicators[lane] = Communicator(lane, group, Alone(), 0, size)
    return replace(
        context,
        topology=Topology(
            world_size=tensor_parallel_size * context_parallel_size,
            tp_size=tensor_parallel_size,
            cp_size=context_parallel_size,
        ),
        megatron_groups=OpenGroups(groups),
        communicators=communicators,
    )


def lowered(
    tensor_parallel_size: int,
    config: ModelConfig = SMALL,
    dtype: torch.dtype = torch.float32,
    recompute: Recompute = "gathers",
    context_parallel_size: int = 1,
    context_exchange: str = "ring",
) -> Lowered:
    """The graphs that rank 0 of so many ranks has."""
    context = context_of_rank_0(tensor_parallel_size, context_parallel_size)
    model = CausalLM(config, context, dtype)
    return lower(model, recompute=recompute, context_exchange=context_exchange)
