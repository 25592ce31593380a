"""What a step takes at least, under any order of its operators, before one is played.

Every visit of a pipeline takes at least what `LeastCosts` says, and messages wait for no others. So
the schedule itself, played with these, is over no later than it really is: bubble, communication
that no order hides, reductions and optimizer included. What stages save is what they will save.
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_dhellam.plan import Graph, Lane
from lightning_dhellam.search.cluster.beginning import beginning
from lightning_dhellam.search.cluster.ending import Groups, optimizer, reduction_of
from lightning_dhellam.search.cluster.machine import Machine
from lightning_dhellam.search.cluster.work import Work
from lightning_dhellam.search.model import Costs
from lightning_dhellam.search.pipeline import Chain, LayerCosts, LeastCosts, Link, play
from lightning_dhellam.search.pipeline.visits import Played


@dataclass(frozen=True)
class Least:
    """What a step takes at least.

    Attributes:
        seconds: of all of it.
        saved: bytes of activations that each stage of a pipeline holds at most; empty without one.
    """

    seconds: float
    saved: tuple[float, ...] = ()


def least_step(
    work: Work,
    costs: Costs,
    machine: Machine,
    groups: Groups,
    link: Link | None,
    known: Played | None = None,
) -> Least:
    """Return what a step takes at least.

    Args:
        work: of the step.
        costs: what operators cost, of a device whose clock is as high as it is at first.
        machine: that ranks run on.
        groups: over which gradients are added up.
        link: between stages.
        known: visits that were looked at already for steps with the same layers and costs; those
            of this step are added.
    """
    ends = (optimizer(work, [*work.of_stage(s)], machine, groups)[0] for s in range(work.stages))
    around = beginning(work, machine) + max(ends)
    if work.stages == 1:
        return Least(least_alone(work, costs) + around)
    chunks = [[work.layers[n] for n in chunk] for chunk in work.chunks]
    least = LeastCosts(LayerCosts(chunks, costs, tokens=work.tokens), known)
    reduced = [reduction_of(work, chunk, groups) for chunk in work.chunks]
    run = play(work.schedule, least, link, reductions=reduced, unhindered=True)
    return Least(run.seconds + around, tuple(use.peak for use in run.stages))


def least_alone(work: Work, costs: Costs) -> float:
    """Return the seconds up to the last gradient that a step without a pipeline takes at least.

    The first micro-batch goes forward alone, and the last one backward. Between the two compute
    has all the rest to do; and no lane is done before it has done all that it has to do.
    """
    chains: dict[int, Chain] = {}

    def chain(graph: Graph) -> Chain:
        if id(graph) not in chains:
            chains[id(graph)] = Chain.of(graph, costs)
        return chains[id(graph)]

    ahead = Chain.joined(chain(layer.forward) for layer in work.layers)
    behind = Chain.joined(chain(layer.backward) for layer in reversed(work.layers))
    both = {lane: ahead.busy.get(lane, 0.0) + behind.busy.get(lane, 0.0) for lane in Lane}
    middle = (work.micro_batches - 1) * both[Lane.COMPUTE]
    return max(
        ahead.computed + middle + behind.whole,
        work.micro_batches * max(both.values()),
    )
