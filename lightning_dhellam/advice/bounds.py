"""What a step takes at least, in seconds and in bytes, before it is played."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from lightning_dhellam.advice.priceable import Priceable
from lightning_dhellam.plan import Graph, Lane
from lightning_dhellam.precision import PRECISIONS
from lightning_dhellam.search.cluster.ending import optimizer

_STATE = 12
"""Bytes of an optimizer's state for each parameter: two moments and a master weight in fp32."""


def least_seconds(one: Priceable) -> float:
    """Seconds that a step takes at least: of its busiest stage, and of the optimizer.

    A stage computes for all micro-batches, and not before the first of them has been forward
    through the chunks before its own. Unless backwards are done in halves, its last work is a
    backward, which others go on with through the chunks before its own.
    """
    work, machine = one.work, one.machine
    ahead = {number: _computed(one, pair.forward) for number, pair in work.distinct.items()}
    both = {n: ahead[n] + _computed(one, pair.backward) for n, pair in work.distinct.items()}
    kinds = [id(layer) for layer in work.layers]
    one_way = ahead if work.stages == 1 or work.splits else both
    before = [0.0, *accumulate(one_way[kind] for kind in kinds)]
    most = last = 0.0
    for stage in range(work.stages):
        own = [*work.of_stage(stage)]
        computed = work.micro_batches * sum(both[kinds[n]] for n in own)
        most = max(most, before[min(own)] + computed)
        last = max(last, optimizer(work, own, machine, one.groups)[0])
    return most + last


def _computed(one: Priceable, graph: Graph) -> float:
    """Seconds of the operators of a graph that compute."""
    costs = one.priced.costs
    return sum(costs.alone(graph, o.name) for o in graph.operators if o.lane is Lane.COMPUTE)


def least_bytes(one: Priceable, saved: Sequence[float] = ()) -> float:
    """Bytes that a rank takes at least: states, and the activations of one micro-batch.

    If a step was played, of as many as its schedule holds: `saved` of each stage.
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
