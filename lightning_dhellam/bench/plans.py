"""The plans that a benchmark compares, made from one profile, and what the simulator says."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_dhellam.plan import BUILDERS, Builder, GraphPair, Lane
from lightning_dhellam.search.model import Costs, Simulation, simulate
from lightning_dhellam.search.solve import Algorithm, ModelSolution, solve

BUILT_IN = ("sequential", "megatron", "dhellam", "interleaved")
SEARCHED = ("pairs", "order", "auto", "spare")
PLANS = (*BUILT_IN, *SEARCHED)
"""`pairs` is the published search for pairs of blocks, `auto` ours; `order` is ours as if operators
did not slow each other down, and with `spare` all GEMMs leave processors to communication, where it
needs any."""


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
        memory_slack: float | None = None,
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
            slack = None if name == "pairs" else memory_slack
            solutions[name] = solve(
                layers, known, algorithm=algorithm, tokens=tokens, memory_slack=slack
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


def lane_seconds(layers: Sequence[GraphPair], costs: Costs) -> dict[Lane, float]:
    """Seconds that each lane needs for one micro-batch, forward and backward, undisturbed."""
    load: dict[Lane, float] = defaultdict(float)
    for pair in layers:
        for graph in (pair.forward, pair.backward):
            for operator in graph.operators:
                load[operator.lane] += costs.alone(graph, operator.name)
    return dict(load)
