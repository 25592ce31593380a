"""Findings and predictions of a size that a real search has, without a device, for pages."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from lightning_dhellam.plan import BUILDERS, Strand
from lightning_dhellam.plan.file import PlanFile
from lightning_dhellam.search.cluster import (
    Advice,
    Candidate,
    Choice,
    LaneUse,
    Prediction,
    StagePrediction,
    VisitSpan,
)
from lightning_dhellam.search.measure import measure
from lightning_dhellam.search.model import Costs, Interval, simulate
from lightning_dhellam.search.report import Findings, Outcome, choose
from lightning_dhellam.search.solve import solve
from tests.search.graphs import FINGERPRINT, TOKENS, FakeBench, costs, graphs_of, model

WEIRD = "</script><b>&'\""
"""A device that must stay text wherever a page shows it."""


@cache
def findings() -> Findings:
    """A search over six layers and four micro-batches."""
    layers = model(6)
    graphs = graphs_of(layers)
    bench = FakeBench(costs(graphs, 110e9, slowdowns=True))
    profile = measure(bench, graphs, replace(FINGERPRINT, device=f"NVIDIA H200 {WEIRD}"))
    known = Costs.of(profile)
    solution = solve(layers, known, tokens=TOKENS)
    builders = {**BUILDERS, "auto": solution.builder()}
    predicted = {
        name: simulate(layers, builder, known, micro_batches=4, tokens=TOKENS)
        for name, builder in builders.items()
    }
    outcomes = [
        Outcome(name, step.seconds, step.exposed, 1.02 * step.seconds, 0.004 * step.seconds)
        for name, step in predicted.items()
    ]
    outcomes[-2] = replace(outcomes[-2], measured=None, spread=0.0)
    winner, reason = choose(outcomes)
    slower = [
        replace(row, start=1.02 * row.start, end=1.02 * row.end)
        for row in predicted["sequential"].intervals
    ]
    return Findings(
        profile,
        solution,
        PlanFile.of(solution.plans, graphs),
        outcomes,
        winner.name,
        reason,
        predicted,
        {"sequential": slower},
        {"profile": 12.3, "solve": 1.4},
    )


@cache
def prediction(stages: int = 4) -> Prediction:
    """A step of so many stages, which takes a second."""
    layers = model(3)
    given = costs(graphs_of(layers), 110e9)
    solution = solve(layers, given, tokens=TOKENS)
    step = simulate(layers, solution.builder(), given, micro_batches=2, tokens=TOKENS)
    visits = ("0F0", "0F1", "0F2+0B0", "0F3+0B1", "0B2", "0W3")
    found = []
    for stage in range(stages):
        memory = {"weights": 9 << 30, "optimizer": 21 << 30, "slots": (40 - 4 * stage) << 30}
        spans = tuple(
            VisitSpan(works, (n + 0.2 * stage) / 8, (n + 0.9 + 0.2 * stage) / 8)
            for n, works in enumerate(visits)
        )
        found.append(StagePrediction(stage, 16, 0.7, 0.05, 0.02, 0.15, 0.03, 0.05, memory, spans))
    lanes = {
        "compute": LaneUse(0.7, 0.0),
        "tp": LaneUse(0.3, 0.05, "inside", 8),
        "dp": LaneUse(0.2, 0.03, "between", 2),
    }
    return Prediction(
        "llama-3.1-70b",
        "h100-64",
        "NVIDIA H100",
        "NVIDIA H200",
        Choice(8, 1, 1, 1, stages, 64 // 8 // stages, 1, 16),
        8192,
        1.0,
        0.94,
        1.07,
        262144.0,
        0.43,
        lanes,
        tuple(found),
        80 << 30,
        step.intervals,
        {"transformer|transformer": str(solution.main.plan)},
        {"measured": 0.6, "derived": 0.3, "modelled": 0.1},
        ("Links carry what their data sheets say, less 20%.",),
    )


def advice() -> Advice:
    """Three choices of a few hundred."""
    best = prediction()
    others = (
        replace(best, seconds=1.05, choice=replace(best.choice, micro_batch_size=2)),
        replace(best, seconds=1.4, choice=replace(best.choice, tp=4, dp=4)),
    )
    rows = (Candidate(best, ""), *(Candidate(one, "its bubble is larger") for one in others))
    return Advice(rows, 384, 60, {"needs more memory than a device has": 200, "slower": 181}, 7.5)


def many(count: int) -> list[Interval]:
    """So many operators, one after the other on one lane."""
    (first, *_) = findings().predicted["auto"].intervals
    one = replace(first, strand=Strand.FORWARD)
    return [replace(one, start=float(n), end=n + 0.9) for n in range(count)]
