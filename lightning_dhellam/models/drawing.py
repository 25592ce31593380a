"""How the weights of a new model are drawn: the same numbers whatever the parallel sizes are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP

from lightning_dhellam.kernels.dropout import derive_key
from lightning_dhellam.models.spec import linears
from lightning_dhellam.parallel.context import ParallelContext


@contextmanager
def seeded(context: ParallelContext, seed: int) -> Iterator[None]:
    """Draw from generators seeded by ``seed``, then put the caller's generators back."""
    devices = [context.device] if context.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        draw_part(context, seed, 0)
        yield


def draw_part(context: ParallelContext, seed: int, *part: int) -> None:
    """Seed the generators for one part of the model."""
    # Megatron's tracker takes neighbouring seeds for neighbouring tensor ranks.
    mixed = derive_key(seed, *part) % 2**31
    torch.manual_seed(mixed)
    topology = context.topology
    # What each expert draws follows from its number alone, not from the rank that has it.
    model_parallel_cuda_manual_seed(
        mixed, tp_rank=topology.tp_rank, ep_rank=0, etp_rank=topology.etp_rank
    )


def draw_experts(mixture: Any, context: ParallelContext, seed: int, part: int) -> None:
    """Draw the weights of a `MoELayer`'s experts again, each from its number in the layer.

    In Megatron-core they follow from how many experts a rank has, and on the CPU all ranks draw
    the same.
    """
    experts, groups = mixture.experts, context.groups
    for place, number in enumerate(mixture.local_expert_indices):
        draw_part(context, seed, part, number)
        config = experts.config
        experts.local_experts[place] = MLP(
            config,
            linears(),
            ffn_hidden_size=config.moe_ffn_hidden_size,
            is_expert=True,
            tp_group=groups.expt_tp,
        )
    if mixture.shared_experts is not None:
        draw_part(context, seed, part, mixture.config.num_moe_experts)
        mixture.shared_experts = SharedExpertMLP(
            mixture.config,
            linears(),
            gate=mixture.config.moe_shared_expert_gate,
            pg_collection=groups,
        )
