"""The reduction of gradients that nothing hides, behind the last backward of a step.

Of many layers that are alike few are played; what the others change follows from a walk through
their backward, a bucket at a time. A tail does not grow evenly with the layers: it begins where the
reductions take longer than the computation beside them.
"""

from __future__ import annotations

from dataclasses import replace

from lightning_dhellam.plan import Builder, Graph
from lightning_dhellam.search.cluster.ending import REDUCE, Groups, reductions
from lightning_dhellam.search.cluster.work import THIN, Work
from lightning_dhellam.search.model import Costs, simulate


def tail_of(
    work: Work, build: Builder, costs: Costs, groups: Groups, *, sketch: bool = False
) -> float:
    """Return the seconds of the reduction that a step without a pipeline waits for.

    Args:
        work: of the step.
        build: makes the plan of each pair of layers.
        costs: what operators cost.
        groups: over which gradients are added up.
        sketch: whether to play few layers of many that are alike, and go on from there.
    """
    if reductions(work, groups) is None:
        return 0.0
    if not (sketch and work.is_deep):
        return _played(work, build, costs, groups)
    thinner, thin = (work.shallow(count) for count in THIN)
    few, more = (
        simulate(one.layers, build, costs, micro_batches=1, tokens=one.tokens).seconds
        for one in (thinner, thin)
    )
    # Alone a forward hides no communication; a backward may, behind gradients of weights.
    layer = (more - few) / (THIN[1] - THIN[0]) - _alone(work.layers[1].forward, costs)
    further = _walked(work, costs, groups, layer) - _walked(thin, costs, groups, layer)
    return max(0.0, _played(thin, build, costs, groups) + further)


def _played(work: Work, build: Builder, costs: Costs, groups: Groups) -> float:
    """Seconds that a step is longer with reductions beside its last backward."""
    # Of few micro-batches: only the last one has reductions beside it.
    one = replace(work, micro_batches=min(2, work.micro_batches))
    found = reductions(one, groups)
    assert found is not None
    beside, bucket = found
    known = replace(costs, seconds={**costs.seconds, REDUCE: bucket})
    reduced = simulate(
        one.layers,
        build,
        known,
        micro_batches=one.micro_batches,
        tokens=one.tokens,
        reductions=beside,
    )
    bare = simulate(one.layers, build, costs, micro_batches=one.micro_batches, tokens=one.tokens)
    return max(0.0, reduced.seconds - bare.seconds)


def _walked(work: Work, costs: Costs, groups: Groups, layer: float) -> float:
    """The same from what each layer's backward takes alone: `layer` seconds between the two ends.

    Buckets are reduced one after another, each once the layer that fills it is done.
    """
    found = reductions(work, groups)
    assert found is not None
    due = found[0].due()
    now = free = 0.0
    for number in reversed(range(len(work.layers))):
        inner = 0 < number < len(work.layers) - 1
        now += layer if inner else _alone(work.layers[number].backward, costs)
        for share in due.get(number, ()):
            free = max(free, now) + share * found[1]
    return max(0.0, free - now)


def _alone(graph: Graph, costs: Costs) -> float:
    return sum(costs.alone(graph, operator.name) for operator in graph.operators)
