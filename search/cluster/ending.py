"""What ends a step: gradients are added up over ranks, and the optimizer makes new weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_dhellam.parallel.networks import Reach
from lightning_dhellam.plan import Collective
from lightning_dhellam.search.cluster.collectives import reduction_seconds, seconds_of
from lightning_dhellam.search.cluster.machine import Machine
from lightning_dhellam.search.cluster.work import Weights, Work
from lightning_dhellam.search.model import Reductions

_MOVED = 34.0
"""Bytes that a step moves for a parameter of its own. Adam reads a master weight, two moments and a
gradient in fp32, and writes back all but the gradient, and a weight in bf16; the norm of gradients
has read each once before."""
REDUCE = "gradients/reduce"
"""Key of the reduction of a bucket."""
_MEMORY = 0.75
"""Share of the memory's bandwidth that the optimizer's many small kernels reach."""


@dataclass(frozen=True)
class Groups:
    """Ranks over which gradients are added up.

    Attributes:
        dense: those of most parameters.
        experts: those of experts.
    """

    dense: Reach
    experts: Reach


def reductions(work: Work, groups: Groups) -> tuple[Reductions, float] | None:
    """Return what is reduced beside the last backward, and the seconds of a bucket."""
    if groups.dense.size == groups.experts.size == 1:
        return None
    bucket = work.bucket * work.gradient_bytes
    reach = groups.dense if groups.dense.size > 1 else groups.experts
    seconds = reduction_seconds(bucket, reach, sharded=work.sharded)
    # Gradients of experts travel otherwise: they count as bytes that take as long.
    sizes = [_layer_reduction(work, weights, groups) / seconds * bucket for weights in work.weights]
    if not sum(sizes):
        return None
    return Reductions(REDUCE, bucket, tuple(sizes)), seconds


def _layer_reduction(work: Work, weights: Weights, groups: Groups) -> float:
    """Seconds in which the gradients of a layer are reduced, as its share of whole buckets."""
    bucket = work.bucket * work.gradient_bytes
    return sum(
        count / work.bucket * reduction_seconds(bucket, reach, sharded=work.sharded)
        for count, reach in ((weights.dense, groups.dense), (weights.experts, groups.experts))
        if reach.size > 1
    )


def reduction_of(work: Work, layers: Sequence[int], groups: Groups) -> float:
    """Return the seconds in which the gradients of some layers are reduced."""
    alike = Counter(work.weights[n] for n in layers)
    return sum(count * _layer_reduction(work, one, groups) for one, count in alike.items())


def optimizer(
    work: Work, layers: Sequence[int], machine: Machine, groups: Groups
) -> tuple[float, float]:
    """Return the seconds from the last gradient to the new weights, and those of their gather."""
    own = gathered = 0.0
    for name in ("dense", "experts"):
        count = sum(getattr(work.weights[n], name) for n in layers)
        reach: Reach = getattr(groups, name)
        shards = reach.size if work.sharded else 1
        own += count / shards
        if shards > 1 and count:
            crossing = 2.0 * count * (shards - 1) / shards
            gathered += seconds_of(Collective.ALL_GATHER, crossing, reach)
    moves = machine.straggler * _MOVED * own / (_MEMORY * machine.device.bandwidth)
    return moves + gathered, gathered
