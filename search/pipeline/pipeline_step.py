"""A step of the pipeline that the trainer runs, as its stages predict it together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from lightning_dhellam.pipeline.schedules import Schedule, Scheme, fold
from lightning_dhellam.plan import Builder, GraphPair
from lightning_dhellam.search.model import Costs
from lightning_dhellam.search.pipeline.links import Links
from lightning_dhellam.search.pipeline.playing import play
from lightning_dhellam.search.pipeline.visits import LayerCosts, UniformCosts, VisitTable


@dataclass(frozen=True)
class PipelineStep:
    """A step of a pipeline by any schedule, as one of its stages predicts it.

    Attributes:
        number: number of this stage, from 0.
        count: how many stages there are.
        micro_batches: how many micro-batches a step has.
        scheme: makes the schedule.
    """

    number: int
    count: int
    micro_batches: int
    scheme: Scheme = fold

    @cached_property
    def schedule(self) -> Schedule:
        """The schedule of all stages."""
        return self.scheme(self.count, self.micro_batches)

    @cached_property
    def _shares(self) -> Sequence[float]:
        """Share of a step in which each stage has something to do, if all visits take as long."""
        return play(self.schedule, UniformCosts()).share("compute")

    @property
    def fill(self) -> float:
        """The mean of that over all stages."""
        return sum(self._shares) / self.count

    def visits(
        self,
        layers: Mapping[int, Sequence[GraphPair]],
        builder: Builder,
        costs: Costs,
        *,
        busy: float,
        tokens: int,
        of_any: bool = False,
    ) -> VisitTable:
        """Tabulate what the visits of this stage cost.

        Args:
            layers: of each of its chunks.
            builder: makes the plan of each pair of graphs.
            costs: what the operators cost.
            busy: share of its visits in which compute works.
            tokens: how many tokens a micro-batch has.
            of_any: tabulate those of any schedule, with stages as filled as in this one.
        """
        chunks = [layers.get(chunk, ()) for chunk in range(self.schedule.chunks)]
        # Compute has more pauses, where stages wait for each other.
        costs = costs.clocked(busy * self._shares[self.number])
        known = LayerCosts(chunks, costs, tokens=tokens, builders={"": builder})
        if of_any:
            return VisitTable.of_kinds(known, self.schedule.placement, self.number)
        return VisitTable.of_stage(known, self.schedule, self.number)

    def seconds(self, tables: Iterable[VisitTable], links: Links | None = None) -> float:
        """Return the seconds of a step, from the tables of all stages and the links between them.

        Transfers are free where no link is known.
        """
        return play(self.schedule, VisitTable.joined(tables), links).seconds
