"""Cross-entropy over a vocabulary that is split over tensor-parallel ranks, by plain autograd."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor

from lightning_dhellam.parallel.context import ParallelContext

IGNORED_LABEL = -100


def vocab_parallel_cross_entropy(
    logits: Tensor, labels: Tensor, vocab_size: int, context: ParallelContext
) -> Tensor:
    """Loss of every token, fp32, zero where the label is -100.

    ``logits`` [..., padded vocabulary / TP] is this rank's share; columns from ``vocab_size`` on
    are padding and take no part. ``labels`` [...] holds token numbers of the whole vocabulary and
    is equal on all TP ranks. This form stores fp32 logits of the whole batch.
    """
    columns = logits.size(-1)
    first = context.topology.tp_rank * columns
    padding = torch.arange(first, first + columns, device=logits.device) >= vocab_size
    scores = logits.float().masked_fill(padding, float("-inf"))

    largest = scores.detach().amax(-1)
    if context.topology.tp_size > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=context.groups.tp)
    scores = scores - largest.unsqueeze(-1)

    local_labels = labels - first
    mine = (local_labels >= 0) & (local_labels < columns)
    index = local_labels.masked_fill(~mine, 0).unsqueeze(-1)
    target = scores.gather(-1, index).squeeze(-1).masked_fill(~mine, 0.0)

    group = context.groups.tp
    total = reduce_from_tensor_model_parallel_region(scores.exp().sum(-1), group=group)
    target = reduce_from_tensor_model_parallel_region(target, group=group)
    return (total.log() - target).masked_fill(labels == IGNORED_LABEL, 0.0)
