"""The machine model: costs, memory, and what a step would do."""

from lightning_dhellam.search.model.cost import Costs, Sample, lanes_of
from lightning_dhellam.search.model.pair_memory import PairMemory
from lightning_dhellam.search.model.reductions import Reductions
from lightning_dhellam.search.model.simulation import Simulation, simulate
from lightning_dhellam.search.model.slowdowns import slowdown_of
from lightning_dhellam.search.model.stops import Place, Stop, names, repeated, step_stops
from lightning_dhellam.search.model.timeline import Interval, Timeline
from lightning_dhellam.search.model.walk import Order, Walk, as_planned

__all__ = [
    "Costs",
    "Interval",
    "Order",
    "PairMemory",
    "Place",
    "Reductions",
    "Sample",
    "Simulation",
    "Stop",
    "Timeline",
    "Walk",
    "as_planned",
    "lanes_of",
    "names",
    "repeated",
    "simulate",
    "slowdown_of",
    "step_stops",
]
