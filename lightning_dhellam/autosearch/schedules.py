"""What a step would take under each schedule that the layers of a run can be walked by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_dhellam.parallel.collectives import of_all_ranks
from lightning_dhellam.pipeline.schedules import Found, ScheduleError, Scheme, playable
from lightning_dhellam.plan import Builder
from lightning_dhellam.runner import Runner
from lightning_dhellam.search.model import Costs
from lightning_dhellam.search.pipeline import (
    Effort,
    FoldedStep,
    Link,
    Ranked,
    VisitTable,
    play,
    ranked,
    searched,
)

SEARCHED = "searched"
TRIED = 4
"""How many of the schedules that are predicted best are tried on real steps."""


@dataclass(frozen=True)
class Forecast:
    """Schedules of a run as all of its stages predict them together.

    Attributes:
        ranking: the best first: those that keep the limits of memory by seconds, then the others.
        schemes: what makes each of them.
    """

    ranking: dict[str, Ranked]
    schemes: dict[str, Scheme]

    @property
    def fitting(self) -> tuple[str, ...]:
        """The schedules that keep the limits of memory, the fastest first."""
        return tuple(name for name, one in self.ranking.items() if not one.over)


def forecast(
    runner: Runner,
    costs: Costs,
    builder: Builder,
    *,
    busy: float,
    tokens: int,
    micro_batches: int,
    link: Link | None = None,
    limit: float | None = None,
    effort: Effort | None = None,
) -> Forecast:
    """Play every schedule that the run's layers can be walked by, and one that is searched.

    Every rank must call this; all come to the same end.

    Args:
        runner: whose layers are meant.
        costs: of the operators of this stage.
        builder: makes the plan of each pair of graphs.
        busy: share of its visits in which compute of this stage works.
        tokens: how many tokens a micro-batch has.
        micro_batches: how many micro-batches a step has.
        link: between stages; transfers are free without.
        limit: most bytes of saved activations on this stage; None if there is no limit.
        effort: how long to search; None if nothing is to be searched.
    """
    stage, layers = runner.engine.stage, runner.engine.layers
    own = {chunk: [layers[i] for i in held] for chunk, held in stage.chunks.items()}
    schemes = playable(stage.placement) | {runner.agreed.schedule: stage.scheme}
    steps = {
        name: FoldedStep(stage.number, stage.count, micro_batches, scheme)
        for name, scheme in schemes.items()
    }
    fullest = max(steps, key=lambda name: steps[name].fill)
    tables = {
        name: step.visits(own, builder, costs, busy=busy, tokens=tokens)
        for name, step in steps.items()
    }
    kinds = steps[fullest].visits(own, builder, costs, busy=busy, tokens=tokens, of_any=True)
    known = of_all_ranks((tables, kinds, limit), runner.context.groups.pp)
    limits: Sequence[float] = [one for _, _, one in known if one is not None]
    runs = {
        name: play(step.schedule, VisitTable.joined(row[name] for row, _, _ in known), link)
        for name, step in steps.items()
    }
    if effort is not None:
        every = VisitTable.joined(one for _, one, _ in known)
        try:
            found = searched(
                stage.placement,
                micro_batches,
                every,
                link,
                limits=limits,
                known=[step.schedule for step in steps.values()],
                effort=effort,
            )
        except ScheduleError:
            pass  # nothing keeps the limits
        else:
            best = min(runs, key=lambda name: runs[name].seconds)
            schemes[SEARCHED] = Found(replace(found, name=SEARCHED), schemes[best])
            runs[SEARCHED] = play(found, every, link)
    return Forecast(ranked(runs, limits), schemes)
