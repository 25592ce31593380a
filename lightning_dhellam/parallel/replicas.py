"""What ranks hold alike starts alike, and stays alike.

Parameters that are not split, and all buffers, are those of the first rank of a pipeline stage when
training or evaluation starts, whatever each rank has drawn; experts are those of the first rank
that holds them. From then on equal gradients keep parameters equal. Buffers, such as the running
statistics of a norm over samples, change by what a rank has seen: after every training step they
are the first rank's again, as in torch's `DistributedDataParallel`. So a run that goes on from a
checkpoint is the run that was never ended.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import Module

from lightning_dhellam.parallel.context import ParallelContext
from lightning_dhellam.parallel.experts import is_expert, mark_experts
from lightning_dhellam.parallel.topology import Topology


def is_split(parameter: Tensor) -> bool:
    """Whether tensor-parallel ranks have different parts of `parameter`, by Megatron's mark of it.

    Of every other parameter each rank computes a part of the gradient, and the parts are added up
    after the step.
    """
    return bool(getattr(parameter, "tensor_model_parallel", False))


def counts_here(parameter: Tensor, topology: Topology, *, in_parts: bool) -> bool:
    """Whether this rank counts `parameter` where each of the whole model's counts once.

    With `in_parts` the ranks that hold the same parameter count a part of it each; without it the
    first of them counts it.
    """
    if is_expert(parameter):
        return in_parts or topology.expert_dp_rank == 0
    first = in_parts or topology.replica == 0
    return first and (is_split(parameter) or topology.tp_rank == 0)


def start_alike(model: Module, context: ParallelContext) -> None:
    """Give this rank what the first rank of its stage holds. Every rank must call this.

    Of a split parameter all replicas get what the first rank with the same part holds, and of an
    expert those that hold the same one.
    """
    groups = context.groups
    mark_experts(model, context.topology)
    if context.planned:
        return
    for parameter in model.parameters():
        if is_expert(parameter):
            _broadcast(parameter.detach(), groups.expt_dp)
            continue
        if not is_split(parameter):
            _broadcast(parameter.detach(), groups.tp)
        _broadcast(parameter.detach(), groups.dp_cp)
    share_buffers(model, context)


def share_buffers(model: Module, context: ParallelContext) -> None:
    """Give this rank the buffers of the first rank of its stage. Every rank must call this."""
    buffers = sorted(model.buffers(), key=lambda buffer: -buffer.element_size())
    if not buffers or context.topology.stage_size == 1:
        return
    # In one message of bytes, the widest first, so that each is aligned.
    together = torch.cat([_bytes(buffer) for buffer in buffers])
    for group in (context.groups.tp, context.groups.dp_cp):
        _broadcast(together, group)
    for buffer, part in zip(buffers, together.split([b.nbytes for b in buffers]), strict=True):
        buffer.detach().copy_(part.view(buffer.dtype).view(buffer.shape))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _broadcast(tensor: Tensor, group: ProcessGroup) -> None:
    if group.size() > 1:
        dist.broadcast(tensor, group=group, group_src=0)
