"""Predicts the steps of all sides of each case."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning_dhellam.advice import Conditions, lowering_of, memory_of
from lightning_dhellam.advice.choices import shape_of
from lightning_dhellam.advice.plans import SEARCHED_PLAN, solution_of
from lightning_dhellam.advice.predict import builders_of, prediction_of
from lightning_dhellam.advice.priceable import Priceable
from lightning_dhellam.bench.published.cases import Case
from lightning_dhellam.bench.published.report import COLUMNS, LIMITS, add
from lightning_dhellam.bench.published.settings import Settings
from lightning_dhellam.bench.report import Report
from lightning_dhellam.parallel import Cluster
from lightning_dhellam.plan import BUILDERS, Builder
from lightning_dhellam.search.cluster import Prediction
from lightning_dhellam.search.measure import Profile
from lightning_dhellam.search.solve import Budget, solve

SIDES = {
    "sequential": "1f1b",
    "megatron": "1f1b",
    "dhellam": "fold",
    "pairs": "fold",
    "auto": "fold",
}
"""Plans, each with the schedule that it has where there is a pipeline: Megatron-LM's, and the
published fold. `pairs` is the published search for pairs of blocks, over our operators."""


def measure(settings: Settings, folder: Path) -> Report:
    """Predict every side of every case."""
    profile = None if settings.profile is None else Profile.load(settings.profile)
    origin = "none" if profile is None else f"{settings.profile}: {profile.fingerprint.device}"
    notes = {"profile": origin, "limits": LIMITS}
    report = Report("published", "predicted", COLUMNS, notes)
    for case in settings.chosen:
        add(report, case, predictions(case, profile, settings.evaluations))
        report.save(folder)
    return report


def predictions(case: Case, profile: Profile | None, evaluations: int) -> dict[str, Prediction]:
    """Predict the step of each side of a case, and of `dhellam` the memory as well."""
    conditions = Conditions(Cluster.load(case.cluster), profile, case.name)
    known = conditions.known()
    lowering = lowering_of(shape_of(case.run("auto", "fold")))
    found = {}
    for plan, schedule in SIDES.items():
        run = case.run(plan if plan in BUILDERS else "auto", schedule)
        one = Priceable.of(run, conditions, known, lowering)
        memory = memory_of(run) if plan == "dhellam" else ()
        builders = _orders(one, plan, evaluations)
        found[plan] = prediction_of(one, builders, memory=memory, sketch=True)
    return found


def _orders(one: Priceable, plan: str, evaluations: int) -> Mapping[str, Builder]:
    """The orders of a plan; `pairs` and `auto` are searched, `auto` beside the built-in ones."""
    if plan in BUILDERS:
        return builders_of(plan)
    if plan == SEARCHED_PLAN:
        return {**BUILDERS, plan: solution_of(one, Budget(evaluations)).builder()}
    work = one.work
    return {
        plan: solve(work.layers, one.priced.costs, algorithm="pairs", tokens=work.tokens).builder()
    }
