"""Plans that were found: of a pair of layers, and of all pairs of a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_dhellam.plan import BUILDERS, Builder, Graph, Kind, Plan, kind_of


@dataclass(frozen=True)
class Solution:
    """A plan of one pair of layers and how good it is.

    Attributes:
        name: name of the pair: `transformer|head`.
        plan: when each operator is issued.
        seconds: period of a pair that repeats itself, else time together with its neighbours.
        bounds: seconds that each resource needs at least, by its name.
        repeats: whether the pair repeats itself.
        proven: whether no valid order is better.
        peak_bytes: bytes that slots take at once during the pair, with what both layers save.
        extra_bytes: how many of them the sequential plan does not need.
        evaluations: orders whose time was computed.
    """

    name: str
    plan: Plan
    seconds: float
    bounds: Mapping[str, float]
    repeats: bool
    proven: bool
    peak_bytes: float
    extra_bytes: float
    evaluations: int

    @property
    def resource(self) -> str:
        """The critical resource: what sets the bound."""
        return max(self.bounds, key=lambda name: self.bounds[name])

    @property
    def bound(self) -> float:
        """Seconds that no order can beat, with operators as this plan runs them."""
        return self.bounds[self.resource]

    @property
    def gap(self) -> float:
        """How far above the bound the plan is, as a share of the bound."""
        return self.seconds / self.bound - 1 if self.bound else 0.0

    def __str__(self) -> str:
        quality = "optimal" if self.proven else f"{self.gap:.1%} above the bound"
        return (
            f"{self.name}: {self.seconds * 1e3:.3f} ms, bound {self.bound * 1e3:.3f} ms"
            f" ({self.resource}), {quality}"
        )


@dataclass(frozen=True)
class ModelSolution:
    """The plans of every pair of layers of a model.

    Attributes:
        solutions: solution of each pair, by the fingerprints of its graphs, those of repeating
            pairs first.
    """

    solutions: Mapping[Kind, Solution]

    @property
    def plans(self) -> dict[Kind, Plan]:
        """All plans by the fingerprints of their graphs."""
        return {kind: solution.plan for kind, solution in self.solutions.items()}

    @property
    def main(self) -> Solution:
        """The solution that counts most: of the pair that occurs most often."""
        return next(iter(self.solutions.values()))

    def builder(self, fallback: Builder = BUILDERS["interleaved"]) -> Builder:
        """Return what gives these plans to an engine; `fallback` plans graphs not among them."""
        plans = self.plans

        def build(forward: Graph | None, backward: Graph | None) -> Plan:
            plan = plans.get(kind_of(forward, backward))
            return plan if plan is not None else fallback(forward, backward)

        return build
