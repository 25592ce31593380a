"""Which of Megatron-core's optimizers steps, and what it has made of the parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from lightning_dhellam.parallel.context import ParallelContext
from lightning_dhellam.parallel.experts import is_expert
from lightning_dhellam.parallel.gradients import GradientBuffers
from lightning_dhellam.parallel.topology import Topology

ELEMENTWISE = "elementwise"
"""What the class of an optimizer says of itself if its rule looks at each element alone."""


def can_shard(optimizer: Optimizer) -> bool:
    """Whether Megatron's distributed optimizer takes it, and its rule allows for that.

    Megatron takes AdamW and what is derived from it. A rank has flat parts of parameters, so a
    derived class must say that it needs no whole ones: `elementwise = True`.
    """
    if type(optimizer) is torch.optim.AdamW:
        return True
    return isinstance(optimizer, torch.optim.AdamW) and getattr(optimizer, ELEMENTWISE, False)


def shards(optimizer: Optimizer, asked: bool | None, precision: str, replicas: int) -> bool:
    """Whether the state of `optimizer` is spread over the ranks that hold the same weights.

    Args:
        optimizer: the user's.
        asked: `distributed_optimizer` as the user gave it; None to spread it where that helps.
        precision: of the run.
        replicas: ranks that it can be spread over.

    Raises:
        ValueError: it was asked for where it cannot work.
    """
    possible = can_shard(optimizer) and precision != "bf16-true"
    if asked is None:
        return possible and replicas > 1
    if asked and not possible:
        raise ValueError(
            f"distributed_optimizer=True does not work with {type(optimizer).__name__} and"
            f" precision='{precision}': it needs '32-true', 'bf16-mixed' or '16-mixed', and"
            f" torch.optim.AdamW or a class derived from it that says {ELEMENTWISE} = True, since"
            " its rule looks at each element alone; or leave distributed_optimizer out"
        )
    return asked


def holders(model: Module, topology: Topology) -> int:
    """How many ranks hold the same parameters, of those of `model` that are on most ranks."""
    experts = topology.expert_dp_size if any(map(is_expert, model.parameters())) else 1
    return max(topology.replicas, experts)


def wrap(
    optimizer: Optimizer,
    config: OptimizerConfig,
    buffers: GradientBuffers,
    context: ParallelContext,
    sharded: bool,
    master_weights: bool,
) -> MegatronOptimizer:
    """Megatron's optimizer around the user's, whose groups then hold what it really steps."""
    if sharded:
        topology = context.topology
        return DistributedOptimizer(
            optimizer,
            config,
            grad_scaler=None,
            init_state_fn=None,
            model_chunks=[buffers.ddp],
            # As if experts were another model: one has a single buffer of a type.
            per_model_buffers={0: buffers.ddp.buffers, 1: buffers.ddp.expert_parallel_buffers},
            data_parallel_group=context.groups.dp_cp,
            data_parallel_group_gloo=None,
            data_parallel_group_idx=topology.tp_rank + topology.pp_rank * topology.tp_size,
            distributed_optimizer_instance_id=0,
        )
    if master_weights:
        return Float16OptimizerWithFloat16Params(optimizer, config, None, None)
    return FP32Optimizer(optimizer, config, None)


def weights_of(megatron: MegatronOptimizer) -> list[tuple[Tensor, Tensor]]:
    """What is stepped on this rank, each with the parameter of the model that it is of."""
    pairs: tuple[tuple[Any, Any], ...]
    if isinstance(megatron, DistributedOptimizer):
        pairs = (
            (megatron.shard_fp32_groups, megatron.model_fp32_groups),
            (megatron.shard_fp32_from_float16_groups, megatron.model_float16_groups),
        )
    elif isinstance(megatron, Float16OptimizerWithFloat16Params):
        pairs = (
            (megatron.fp32_from_float16_groups, megatron.float16_groups),
            (megatron.fp32_from_fp32_groups, megatron.fp32_from_fp32_groups),
        )
    else:
        own = [group["params"] for group in megatron.param_groups]
        pairs = ((own, own),)
    return [
        pair
        for own, models in pairs
        for of_group in zip(own, models, strict=True)
        for pair in zip(*of_group, strict=True)
    ]


def stepped(megatron: DistributedOptimizer, names: Mapping[Tensor, str]) -> list[list[str]]:
    """Names of what the sharded optimizer steps on this rank: of each group those in fp32 first."""
    both = zip(megatron.model_fp32_groups, megatron.model_float16_groups, strict=True)
    return [[names[p] for p in (*fp32, *half)] for fp32, half in both]


def parts(megatron: DistributedOptimizer, names: Mapping[Tensor, str]) -> dict[str, list[int]]:
    """The first element of each parameter that this rank steps, and the end of its part."""
    ranges = {p: megatron._get_model_param_range_map(p) for p in megatron.model_param_gbuf_map}
    return {names[p]: [own["param"].start, own["param"].end] for p, own in ranges.items()}
