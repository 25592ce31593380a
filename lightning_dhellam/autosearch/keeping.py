"""What is kept of a search: the file of the plan that was chosen, the same on all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_dhellam.autosearch.candidates import Candidates
from lightning_dhellam.autosearch.profiling import versions
from lightning_dhellam.parallel.collectives import of_all_ranks
from lightning_dhellam.plan import Graph, Kind
from lightning_dhellam.plan.file import PlanFile
from lightning_dhellam.plan.offloading import Offload, Slots
from lightning_dhellam.runner import Runner
from lightning_dhellam.search.report import Outcome, Walked


def _by_layer(what: Offload) -> Mapping[str, Slots]:
    """What was chosen by layer; nothing where it was given for all."""
    return what if isinstance(what, Mapping) else {}


def plan_file(
    runner: Runner,
    candidates: Candidates,
    winner: str,
    reason: str,
    outcomes: Sequence[Outcome],
    walked: Walked | None,
) -> PlanFile:
    """The file of the plan `winner`, of all stages' graphs. Every rank must call this.

    Args:
        runner: that trains.
        candidates: the plans.
        winner: name of the chosen one.
        reason: why it was chosen.
        outcomes: of all that were tried.
        walked: the schedule that was chosen, if any was searched.
    """
    graphs: dict[str, Graph] = {}
    for pair in runner.engine.layers:
        for graph in (pair.forward, pair.backward):
            graphs[graph.fingerprint] = graph
    builder = candidates.builders[winner]
    kinds: Sequence[Kind] = list(candidates.solution.solutions)
    mine = PlanFile.of(
        {(f, b): builder(graphs.get(f), graphs.get(b)) for f, b in kinds},
        graphs.values(),
        conditions=runner.agreed.conditions,
        versions=versions(),
        notes={
            "plan": winner,
            "reason": reason,
            "step_ms": {
                o.name: {"predicted": o.predicted * 1e3, "measured": (o.measured or 0) * 1e3}
                for o in outcomes
            },
        },
    )
    # Other stages have pairs of graphs that this one has not.
    plans, names = dict(mine.plans), dict(mine.graphs)
    for more, others in of_all_ranks((plans, names), runner.context.world_group):
        plans, names = {**more, **plans}, {**others, **names}
    chosen = runner.agreed.chosen
    return replace(
        mine,
        plans=plans,
        graphs=names,
        recompute=chosen or {},
        offload=_by_layer(runner.agreed.offload) if chosen else {},
        schedule=walked.kept if walked is not None else {},
    )
