"""The model of a job that a runner joins: its processes first, then this rank's part of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from typing import TypedDict

import torch

from lightning_dhellam.models import CausalLM, ModelConfig, crossing_bytes
from lightning_dhellam.models import pipeline_split as split_of
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.join import join, this_device
from lightning_dhellam.pipeline.schedules import placement_of
from lightning_dhellam.precision import PRECISIONS

Model = ModelConfig | Callable[[ParallelContext, torch.dtype], CausalLM]
"""Its configuration, or what makes it of a context and a type."""


class Sizes(TypedDict):
    """How many ranks share what, as `Runner.create` takes it."""

    tensor_parallel_size: int
    pipeline_parallel_size: int
    context_parallel_size: int
    expert_parallel_size: int
    expert_tensor_parallel_size: int | None


def build_model(
    model: Model,
    device: torch.device | str | None,
    leaving: ExitStack,
    *,
    sizes: Sizes,
    context_transport: str,
    pipeline_transport: str,
    pipeline_split: list[int] | None,
    schedule: str | None,
    micro_batch_size: int,
    precision: str,
    seed: int,
    timeout: timedelta,
) -> CausalLM:
    """Join the processes of the job, and build this rank's part of the model on its device.

    `leaving` is given what leaves them again. All else is as `Runner.create` takes it.

    Raises:
        ValueError: a value that cannot work, before the model is built.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision='{precision}' must be one of {', '.join(PRECISIONS)}")
    device, dtype = this_device(device), PRECISIONS[precision].dtype
    placement, crossing = placement_of(schedule, sizes["pipeline_parallel_size"]), None
    tied = model.tie_embeddings if isinstance(model, ModelConfig) else True
    leaving.callback(join(device, timeout))
    if isinstance(model, ModelConfig):
        model.validate(
            sizes["tensor_parallel_size"],
            sizes["expert_parallel_size"],
            sizes["expert_tensor_parallel_size"],
            sizes["context_parallel_size"],
        )
        pipeline_split = list(split_of(model, placement, pipeline_split))
        crossing = crossing_bytes(model, dtype, micro_batch_size * model.max_sequence_length)
    context = ParallelContext.create(
        device,
        pipeline_split=tuple(pipeline_split or ()),
        timeout=timeout,
        crossing=crossing,
        placement=placement,
        tied=tied,
        context_transport=context_transport,
        pipeline_transport=pipeline_transport,
        **sizes,
    )
    leaving.callback(context.destroy)
    if isinstance(model, ModelConfig):
        built = CausalLM(model, context, dtype, seed)
    else:
        built = model(context, dtype)
    built.settle()
    return built.to(device)
