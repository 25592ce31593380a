"""A step of the pipeline that the trainer runs, from what each stage knows of its own layers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from lightning_dhellam.plan import Builder, GraphPair
from lightning_dhellam.search.model.cost import Costs
from lightning_dhellam.search.pipeline.passes import LayerCosts, PassTable, UniformCosts
from lightning_dhellam.search.pipeline.schedules import Schedule, fold
from lightning_dhellam.search.pipeline.stages import run


@dataclass(frozen=True)
class OneOfStages:
    """A stage of the folded pipeline.

    Attributes:
        number: from 0.
        count: stages.
        micro_batches: of a step.
    """

    number: int
    count: int
    micro_batches: int

    @cached_property
    def schedule(self) -> Schedule:
        """Of all stages."""
        return fold(self.count, self.micro_batches)

    @cached_property
    def _filled(self) -> float:
        """Share of a step in which this stage has something to do, if all passes take as long."""
        return run(self.schedule, UniformCosts()).share("compute")[self.number]

    def passes(
        self,
        descending: Sequence[GraphPair],
        ascending: Sequence[GraphPair],
        builder: Builder,
        costs: Costs,
        *,
        busy: float,
        tokens: int,
    ) -> PassTable:
        """What the passes of this stage cost.

        Args:
            descending: layers of its first chunk.
            ascending: layers of its second chunk.
            builder: makes the plan of each pair of graphs.
            costs: of the operators.
            busy: share of its passes in which compute works.
            tokens: of a micro-batch.
        """
        chunks: list[Sequence[GraphPair]] = [()] * (2 * self.count)
        chunks[self.number], chunks[-1 - self.number] = descending, ascending
        # Compute has more pauses, where stages wait for each other.
        costs = costs.clocked(busy * self._filled)
        known = LayerCosts(chunks, costs, tokens=tokens, builders={"": builder})
        return PassTable.of_stage(known, self.schedule, self.number)

    def seconds(self, tables: Iterable[PassTable]) -> float:
        """Of a step, from the tables of all stages. Transfers between them count as free."""
        return run(self.schedule, PassTable.joined(tables)).seconds
