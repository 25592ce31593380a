"""The pages of a prediction and of an advice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from lightning_dhellam.plan import Lane, Plan
from lightning_dhellam.search.cluster import Advice, Prediction, StagePrediction
from lightning_dhellam.search.report.outcomes import time_text
from lightning_dhellam.search.report.page.changes import of_prediction
from lightning_dhellam.search.report.page.values import (
    Bar,
    BarRow,
    Bars,
    Group,
    Page,
    Table,
    View,
    bars_view,
    plan_view,
    view_of,
)

_GIB = 2**30
_PARTS = ("compute", "exposed", "transfer", "bubble", "reduction", "optimizer")
"""What the seconds of a stage are spent on."""


def prediction_page(step: Prediction) -> Page:
    """The page of one step on a cluster."""
    return Page(
        f"{step.model} on {step.cluster}",
        _facts(step),
        [_conclusion(step), *step.notes],
        _timelines(step),
        [plan_view(kind, Plan.parse(table)) for kind, table in step.plans.items()],
        _groups(step),
        changes=of_prediction(step),
    )


def advice_page(advice: Advice, whole: Prediction | None = None) -> Page:
    """The page of the best of many choices, and of what lost.

    `whole` is the best one's step with all of its layers played, where that was done.
    """
    best = whole or advice.best
    head = ("choice", "played by", "step", "range", "tokens/s", "MFU", "memory", "why not")
    rows = [
        (
            str(one.prediction.choice),
            one.prediction.plan or one.prediction.choice.plan,
            time_text(one.prediction.seconds),
            _range(one.prediction),
            f"{one.prediction.tokens_per_second:,.0f}",
            f"{one.prediction.mfu:.1%}",
            f"{one.prediction.bytes / _GIB:.1f} GiB",
            one.reason or "the best",
        )
        for one in advice.candidates
    ]
    table = Table(head, rows, (2, 3, 4, 5, 6), 0)
    steps = _steps({str(one.prediction.choice): one.prediction for one in advice.candidates})
    groups = [Group("Candidates", [table], [replace(steps, best=0)], wide=True)]
    if advice.refused:
        refused = sorted(advice.refused.items(), key=lambda item: -item[1])
        lost = [(reason, f"{count:,}") for reason, count in refused]
        groups.append(Group("Left out", [Table(("why", "choices"), lost, (1,))], wide=True))
    said = (
        f"{advice.looked_at:,} choices in {time_text(advice.seconds)}, {advice.played:,} of them"
        " played step by step."
    )
    return Page(
        f"{best.model} on {best.cluster}: the best of {advice.looked_at:,} choices",
        _facts(best),
        [_conclusion(best), said, *best.notes],
        _timelines(best),
        [plan_view(kind, Plan.parse(table)) for kind, table in best.plans.items()],
        [*groups, *_groups(best)],
        changes=of_prediction(best),
    )


def _facts(step: Prediction) -> dict[str, str]:
    return {
        "choice": str(step.choice),
        "ranks": f"{step.choice.ranks:,} × {step.device}",
        "global batch": f"{step.choice.global_batch:,} × {step.length:,} tokens",
        "measured on": step.profile or "nothing: derived from data sheets",
    }


def _range(step: Prediction) -> str:
    return f"{time_text(step.low)} – {time_text(step.high)}"


def _conclusion(step: Prediction) -> str:
    return (
        f"A step takes {time_text(step.seconds)} ({_range(step)}):"
        f" {step.tokens_per_second:,.0f} tokens/s, {step.mfu:.1%} MFU, bubble {step.bubble:.1%},"
        f" {step.bytes / _GIB:.1f} of {step.memory_limit / _GIB:.1f} GiB on the fullest rank."
    )


def _timelines(step: Prediction) -> list[View]:
    views = []
    if step.intervals:
        views.append(view_of("a pair of layers of one rank", step.intervals))
    if any(stage.visits for stage in step.stages):
        lanes = [f"stage {stage.stage}" for stage in step.stages]
        bars = [bar for stage in step.stages for bar in _visits(stage)]
        views.append(replace(bars_view("the stages of a step", bars, lanes), scale=1))
    return views


def _visits(stage: StagePrediction) -> list[Bar]:
    bars: list[Bar] = []
    for visit in stage.visits:
        begins = "F" in visit.works
        goes_back = any(part in visit.works for part in "BIW")
        strand = "both" if begins and goes_back else "backward" if goes_back else "forward"
        name = f"stage {stage.stage}", strand, visit.works, None, None
        bars.append((*name, visit.start, visit.end))
    return bars


def _groups(step: Prediction) -> list[Group]:
    spent = [
        BarRow(f"stage {stage.stage}", _seconds(stage), time_text(step.seconds))
        for stage in step.stages
    ]
    lanes = [lane for lane in Lane if str(lane) in step.lanes]
    rows = [_lane(str(lane), step) for lane in lanes]
    head = ("lane", "busy", "exposed", "of the step", "network", "ranks")
    groups = [
        Group(
            "Lanes and stages",
            [Table(head, rows, (1, 2, 3, 5))],
            [
                _steps({"the step": step}),
                Bars("Where the time of a step goes", _PARTS, spent),
            ],
            wide=True,
        )
    ]
    kinds = list(dict.fromkeys(kind for stage in step.stages for kind in stage.memory))
    if kinds:
        taken = [
            BarRow(
                f"stage {stage.stage}",
                [stage.memory.get(kind, 0) for kind in kinds],
                f"{stage.bytes / _GIB:.1f} GiB",
            )
            for stage in step.stages
        ]
        limit = f"all of a device, {step.memory_limit / _GIB:.1f} GiB"
        bars = Bars("Memory of a rank", kinds, taken, limit, limit=step.memory_limit)
        groups.append(Group("Memory", bars=[bars]))
    return groups


def _steps(steps: Mapping[str, Prediction]) -> Bars:
    """Steps by name, with the seconds from which to which they may take."""
    rows = [
        BarRow(name, [step.seconds], time_text(step.seconds), error=(step.low, step.high))
        for name, step in steps.items()
    ]
    return Bars("Steps, with error bars", ["step"], rows)


def _seconds(stage: StagePrediction) -> Sequence[float]:
    return [getattr(stage, part) for part in _PARTS]


def _lane(name: str, step: Prediction) -> tuple[str, ...]:
    use = step.lanes[name]
    exposed = "–" if name == Lane.COMPUTE else time_text(use.exposed)
    share = use.busy if name == Lane.COMPUTE else use.exposed
    return (
        name,
        time_text(use.busy),
        exposed,
        f"{share / step.seconds:.1%}",
        use.level or "–",
        str(use.ranks),
    )
