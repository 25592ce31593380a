"""The best order of each pair of layers, and what no order can beat."""

from lightning_dhellam.search.solve.bound import bounds
from lightning_dhellam.search.solve.orders import PairOrder
from lightning_dhellam.search.solve.problem import Problem, Surroundings
from lightning_dhellam.search.solve.solution import ModelSolution, Solution
from lightning_dhellam.search.solve.solver import (
    Algorithm,
    Budget,
    peak_bytes,
    solve,
    solve_pair,
)
from lightning_dhellam.search.solve.steady import SteadyState, steady_state

__all__ = [
    "Algorithm",
    "Budget",
    "ModelSolution",
    "PairOrder",
    "Problem",
    "Solution",
    "SteadyState",
    "Surroundings",
    "bounds",
    "peak_bytes",
    "solve",
    "solve_pair",
    "steady_state",
]
