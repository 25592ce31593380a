"""How much each token of a batch counts: one over all that count, on every rank that trains.

The loss of a global batch is the sum of its tokens' losses over the number of those that count,
and a rank does not know how many the others have. So they add up their numbers on the `dp` lane
while the first layers run; only the loss waits for it, on the device:

    compute   count | embedding  layer  layer ...  head
    dp              | all-reduce  divide ----------^
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dhellam.engine.tape import Slot
from lightning_dhellam.engine.tracks import Lanes
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.collectives import Pending
from lightning_dhellam.parallel.work import Once
from lightning_dhellam.plan import Lane, Operator

IGNORED = -100
"""Label of a token that does not count, as in Hugging Face and torch."""


class Everyone(NamedTuple):
    """The ranks whose batches make up the global one.

    Attributes:
        group: of them.
        lanes: of this rank's device.
    """

    group: dist.ProcessGroup
    lanes: Lanes

    @classmethod
    def of(cls, context: ParallelContext, lanes: Lanes, *, weighs_all: bool = False) -> Self | None:
        """The ranks that share a global batch; None where this one is alone, or has no loss.

        With `weighs_all` every stage of a pipeline has losses, of its experts.
        """
        if context.topology.replicas == 1 or context.emulated:
            return None
        if not (context.has_loss or weighs_all):
            return None
        return cls(context.groups.dp_cp, lanes)

    @classmethod
    def with_same_samples(cls, context: ParallelContext, lanes: Lanes) -> Self | None:
        """The ranks that share this one's sequences; None where it is alone, or has no loss."""
        if context.topology.cp_size == 1 or not context.has_loss or context.emulated:
            return None
        return cls(context.groups.cp, lanes)


class Weights(NamedTuple):
    """What counts of a micro-batch in the loss of the global batch.

    Attributes:
        tokens: the part of each token, [S, B] in fp32.
        samples: the part of its samples together, a number or a scalar in fp32.
        each: the part of every token that is no padding, a scalar in fp32.
    """

    tokens: Tensor | Slot
    samples: Any
    each: Tensor | Slot


def weights_here(
    counts: Tensor, sizes: Sequence[int], scale: Tensor | None = None
) -> list[Weights]:
    """The weights of each micro-batch where this rank's batch is the whole one.

    Args:
        counts: what each token of the batch counts for, and whether it is no padding: [2, S, B] in
            fp32.
        sizes: samples of each micro-batch.
        scale: what every weight is multiplied by, a scalar; None for 1.
    """
    total = _never_zero(counts.sum((1, 2)))
    samples: Any = sum(sizes)
    if scale is not None:
        total, samples = total / scale, samples / scale
    weights, each = counts[0] / total[0], total[1].reciprocal()
    parts = weights.split(list(sizes), dim=1)
    return [
        Weights(part.clone(memory_format=torch.contiguous_format), size / samples, each)
        for part, size in zip(parts, sizes, strict=True)
    ]


def weights_everywhere(
    counts: Tensor, sizes: Sequence[int], everyone: Everyone, scale: Tensor | None = None
) -> list[Weights]:
    """The weights of each micro-batch in the global batch. Every rank of it must call this.

    They are on their way when this returns: slots that say when they are there. `counts` must
    outlive the step, and so must `scale`, a scalar that every weight is multiplied by.
    """

    def run(counts: Tensor, scale: Tensor | None = None) -> Pending:
        total = torch.cat([counts.sum((1, 2)), counts.new_full((1,), float(sum(sizes)))])
        tokens = [counts.new_empty(counts.shape[1], size) for size in sizes]
        samples, each = [counts.new_empty(()) for _ in sizes], counts.new_empty(())

        def divide() -> None:
            total[:2] = _never_zero(total[:2])
            if scale is not None:
                total.div_(scale)
            for part, out in zip(counts[0].split(list(sizes), dim=1), tokens, strict=True):
                torch.div(part, total[0], out=out)
            torch.reciprocal(total[1], out=each)
            for size, out in zip(sizes, samples, strict=True):
                torch.div(counts.new_full((), float(size)), total[2], out=out)

        work = dist.all_reduce(total, group=everyone.group, async_op=not counts.is_cuda)
        if work is None:
            divide()
            return Pending((tokens, samples, each), None)
        return Pending((tokens, samples, each), Once([work], divide))

    lanes = everyone.lanes
    reads = {"counts": counts} if scale is None else {"counts": counts, "scale": scale}
    operator = Operator("weights", Lane.DP, (*reads,), ("tokens", "samples", "each"), run)
    read = [*lanes.constants(reads).values()]
    (tokens, samples, each), mark = lanes.launch(operator, read, crosses=True)
    pairs = zip(tokens, samples, strict=True)
    one = Slot(each, mark)
    return [Weights(Slot(token, mark), Slot(sample, mark), one) for token, sample in pairs]


def _never_zero(total: Tensor) -> Tensor:
    """A batch in which nothing counts has loss 0, not 0 / 0."""
    return torch.where(total > 0, total, torch.ones_like(total))
