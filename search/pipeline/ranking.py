"""Which schedule is best where, and why not the others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lightning_dhellam.pipeline.schedules import Schedule, verify
from lightning_dhellam.search.pipeline.links import Link, Links
from lightning_dhellam.search.pipeline.playing import PipelineRun, StageUse, play
from lightning_dhellam.search.pipeline.visits import VisitCosts

_PARTS = ("bubble", "transfer", "exposed", "compute")
_WORDS = {
    "bubble": "bubble",
    "transfer": "transfers",
    "exposed": "communication that nothing hides",
    "compute": "compute",
}
_TIE = 1e-4
"""Share of a step by which two may differ and be as fast as each other."""


@dataclass(frozen=True)
class Ranked:
    """A schedule among others.

    Attributes:
        run: the step under it.
        over: by how much its stages exceed their limits of saved activations, at most.
        reason: why it is not the best one; empty for the best, if that keeps the limits.
    """

    run: PipelineRun
    over: float
    reason: str


def rank(
    schedules: Iterable[Schedule],
    costs: VisitCosts,
    link: Link | Links | None = None,
    *,
    limits: Sequence[float] = (),
    reductions: Sequence[float] = (),
) -> list[Ranked]:
    """Play schedules and rank them: those that keep the limits of memory by seconds, then others.

    It is a pure function of its arguments, so that ranks that know the same costs come to the same
    end: `VisitTable.of_kinds` tells those of one stage, and `VisitTable.joined` those of all.

    Args:
        schedules: of one placement. One that cannot run is refused by `verify`.
        costs: of their visits.
        link: between all stages, or by source and target; transfers are free without.
        limits: most saved activations of each stage, in the unit of `costs`; none if not given.
        reductions: see `play`.
    """
    runs = []
    for schedule in schedules:
        verify(schedule)
        runs.append(play(schedule, costs, link, reductions=reductions))
    names = [f"{number} {run.schedule.name}" for number, run in enumerate(runs)]
    return list(ranked(dict(zip(names, runs, strict=True)), limits).values())


def ranked(runs: Mapping[str, PipelineRun], limits: Sequence[float] = ()) -> dict[str, Ranked]:
    """Rank steps that were played; see `rank`. The best comes first."""
    over = {name: _over(run, limits) for name, run in runs.items()}
    order = sorted(runs, key=lambda name: (max(over[name], 0.0), runs[name].seconds))
    return {
        name: Ranked(
            runs[name],
            max(over[name], 0.0),
            ""
            if name == order[0] and over[name] <= 0.0
            else _reason(runs[name], runs[order[0]], limits),
        )
        for name in order
    }


def _over(run: PipelineRun, limits: Sequence[float]) -> float:
    if not limits:
        return 0.0
    return max(use.peak - limit for use, limit in zip(run.stages, limits, strict=True))


def _reason(run: PipelineRun, best: PipelineRun, limits: Sequence[float]) -> str:
    if _over(run, limits) > 0.0:
        stage = max(range(len(limits)), key=lambda one: run.stages[one].peak - limits[one])
        if limits[stage] <= 0.0:
            return f"stage {stage} has no room for what it would save"
        share = run.stages[stage].peak / limits[stage] - 1
        return f"stage {stage} would save {share:.1%} more than its limit"
    share = run.seconds / best.seconds - 1
    if share < _TIE:
        return "as fast"
    more = {part: _mean(run, part) - _mean(best, part) for part in _PARTS}
    part = max(more, key=lambda one: more[one])
    gained = more[part] / best.seconds
    return f"{share:.1%} slower: {gained:.1%} of the best step more in {_WORDS[part]}"


def _mean(run: PipelineRun, part: str) -> float:
    values = [_value(use, part) for use in run.stages]
    return sum(values) / len(values)


def _value(use: StageUse, part: str) -> float:
    value: float = getattr(use, part)
    return value
