"""The plans that a benchmark compares, made from one profile, and what the simulator says."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from lightning_dhellam.parallel.collectives import largest
from lightning_dhellam.plan import BUILDERS, Builder, GraphPair, Lane
from lightning_dhellam.search.model import Costs, Simulation, simulate
from lightning_dhellam.search.solve import Algorithm, Budget, ModelSolution, solve

BUILT_IN = ("sequential", "megatron", "dhellam", "interleaved")
SEARCHED = ("pairs", "order", "auto", "spare")
PLANS = (*BUILT_IN, *SEARCHED)
"""`pairs` is the published search for pairs of blocks, `auto` ours; `order` is ours as if operators
did not slow each other down, and with `spare` all GEMMs leave processors to communication, where it
needs any."""

_SHORT = 0.03
"""Share of a usual search that is timed to know how long one takes."""


@dataclass(frozen=True)
class Plans:
    """Plans of the same layers by name, and what is known of them.

    Attributes:
        costs: What their operators cost.
        builders: Their builders by name.
        solutions: What the search says of those that were searched.
        search_seconds: The seconds that the search of each took.
    """

    costs: Costs
    builders: Mapping[str, Builder]
    solutions: Mapping[str, ModelSolution] = field(default_factory=dict)
    search_seconds: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        layers: Sequence[GraphPair],
        costs: Costs,
        names: Sequence[str] = PLANS,
        *,
        tokens: int = 1,
        memory_limit: float | None = None,
        memory_slack: float | None = None,
        budget: Budget | None = None,
    ) -> Plans:
        """Take the built-in plans, and search for the others; see `solve`."""
        builders = {name: BUILDERS[name] for name in names if name in BUILDERS}
        variants = {"order": costs.without_slowdowns(), "spare": costs.sparing(costs.sparable)}
        solutions, seconds = {}, {}
        for name in names:
            if name in BUILDERS or (name == "spare" and not costs.sparable):
                continue
            begin = time.perf_counter()
            known = variants.get(name, costs)
            algorithm: Algorithm = "pairs" if name == "pairs" else "auto"
            free = name == "pairs"
            solutions[name] = solve(
                layers,
                known,
                algorithm=algorithm,
                tokens=tokens,
                memory_limit=None if free else memory_limit,
                memory_slack=None if free else memory_slack,
                budget=budget,
            )
            seconds[name] = time.perf_counter() - begin
            builders[name] = solutions[name].builder()
        made = {name: builders[name] for name in names if name in builders}
        return cls(costs, made, solutions, seconds)

    def simulate(
        self, layers: Sequence[GraphPair], name: str, micro_batches: int, tokens: int = 1
    ) -> Simulation:
        """A step of `micro_batches` micro-batches under a plan."""
        return simulate(
            layers, self.builders[name], self.costs, micro_batches=micro_batches, tokens=tokens
        )


def budget_within(
    seconds: float | None,
    layers: Sequence[GraphPair],
    costs: Costs,
    *,
    tokens: int = 1,
    memory_slack: float | None = None,
    group: dist.ProcessGroup | None = None,
) -> Budget | None:
    """How many orders a search can look at in so many seconds, by a short one that is timed here.

    All ranks of `group` get the same, so that they find the same. None for no limit.
    """
    if seconds is None:
        return None
    usual, begin = Budget(), time.perf_counter()
    solve(layers, costs, tokens=tokens, memory_slack=memory_slack, budget=_part_of(usual, _SHORT))
    taken = torch.tensor([time.perf_counter() - begin], dtype=torch.float64)
    share = _SHORT * seconds / largest(taken, group).item()
    return _part_of(usual, min(max(share, _SHORT), 1.0))


def _part_of(budget: Budget, share: float) -> Budget:
    return replace(
        budget,
        evaluations=round(budget.evaluations * share),
        rare_evaluations=round(budget.rare_evaluations * share),
        exact_nodes=round(budget.exact_nodes * share),
    )


def lane_seconds(layers: Sequence[GraphPair], costs: Costs) -> dict[Lane, float]:
    """Seconds that each lane needs for one micro-batch, forward and backward, undisturbed."""
    load: dict[Lane, float] = defaultdict(float)
    for pair in layers:
        for graph in (pair.forward, pair.backward):
            for operator in graph.operators:
                load[operator.lane] += costs.alone(graph, operator.name)
    return dict(load)
