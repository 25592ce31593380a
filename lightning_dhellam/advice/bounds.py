"""What a step takes at least, in seconds and in bytes, before it is played."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_dhellam.advice.priceable import Priceable
from lightning_dhellam.precision import PRECISIONS
from lightning_dhellam.search.cluster.least import Least, least_step
from lightning_dhellam.search.cluster.step import Visits

_STATE = 12
"""Bytes of an optimizer's state for each parameter: two moments and a master weight in fp32."""


def least_time(one: Priceable, known: Visits | None = None) -> Least:
    """Seconds that a step takes at least, and what its stages save, before it is played.

    Args:
        one: whose step it is.
        known: visits of steps with the same layers and prices; those of this step are added.
    """
    visits = None if known is None else known.setdefault(1.0, {})
    return least_step(one.work, one.priced.costs, one.machine, one.groups, one.link, visits)


def least_bytes(one: Priceable, saved: Sequence[float] = ()) -> float:
    """Bytes that a rank takes at least: states, and the activations of one micro-batch.

    If that is known, of as many as its schedule holds: `saved` of each stage.
    """
    work, numbers = one.work, PRECISIONS[one.run.precision]
    state = _STATE if numbers.master_weights else 8
    each = [
        numbers.dtype.itemsize + work.gradient_bytes + state / (reach.size if work.sharded else 1)
        for reach in (one.groups.dense, one.groups.experts)
    ]
    sizes = {number: pair.saved_bytes(work.tokens) for number, pair in work.distinct.items()}
    most = 0.0
    for stage in range(work.stages):
        held = kept = 0.0
        for n in work.of_stage(stage):
            weights = work.weights[n]
            held += weights.dense * each[0] + weights.experts * each[1]
            kept += sizes[id(work.layers[n])]
        most = max(most, held + max(kept, saved[stage] if saved else 0.0))
    return most
