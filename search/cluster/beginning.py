"""What begins a step: operators that run once, before the first micro-batch, such as casts of
weights."""

from __future__ import annotations

from lightning_dhellam.plan import nominal
from lightning_dhellam.search.cluster.machine import Machine
from lightning_dhellam.search.cluster.work import Work

_MEMORY = 0.83
"""Share of the memory's bandwidth that casts reach."""


def beginning(work: Work, machine: Machine) -> float:
    """Return the seconds before the first micro-batch, of the stage that it begins on.

    Others do theirs while they wait for it.
    """
    graphs = (work.layers[n].forward for n in work.of_stage(work.placement.first))
    moved = sum(o.cost * nominal.MEMORY for graph in graphs for o in graph.preparation)
    return machine.straggler * moved / (_MEMORY * machine.device.bandwidth)
