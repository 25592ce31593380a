"""Plans of a candidate, as the search of a run would find them from the same times.

The solver takes seconds for a pair of layers, so only the best few of many choices get plans of
their own, for as long as there is time. Choices whose layers and prices are the same share them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping

from lightning_dhellam.advice.priceable import Priceable
from lightning_dhellam.plan import BUILDERS, Builder
from lightning_dhellam.search.cluster import THIN
from lightning_dhellam.search.solve import Budget, ModelSolution, solve

SEARCHED_PLAN = "auto"
"""What a searched plan is called."""


class PlanSearch:
    """Searches plans for so many seconds, all choices together.

    Args:
        seconds: after which no further search begins; 0 for none at all.
        budget: of each search; the solver's own if not given.
        clock: tells the seconds.
    """

    def __init__(
        self,
        seconds: float,
        budget: Budget | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds = seconds
        self._budget = budget
        self._clock = clock
        self._until: float | None = None
        self._known: dict[Hashable, ModelSolution] = {}

    @property
    def is_over(self) -> bool:
        """Whether the time is spent. It runs from when that is first asked."""
        now = self._clock()
        if self._until is None:
            self._until = now + self._seconds
        return now >= self._until

    def builders(self, one: Priceable, key: Hashable) -> Mapping[str, Builder] | None:
        """The built-in orders and the searched one; None if there is no time left to search.

        Args:
            one: whose layers are ordered.
            key: the same for choices with the same layers and prices.
        """
        if key not in self._known:
            if self.is_over:
                return None
            self._known[key] = solution_of(one, self._budget)
        return {**BUILDERS, SEARCHED_PLAN: self._known[key].builder()}


def solution_of(one: Priceable, budget: Budget | None = None) -> ModelSolution:
    """The solver's plans of a run's layers; of many that are alike few are looked at."""
    work = one.work
    layers = work.shallow(THIN[1]).layers if work.is_deep else work.layers
    return solve(layers, one.priced.costs, tokens=work.tokens, budget=budget)
