"""The page of a search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from typing import Protocol

from lightning_dhellam.plan import Lane
from lightning_dhellam.plan.file import PlanFile
from lightning_dhellam.search.measure import Profile
from lightning_dhellam.search.model import Simulation
from lightning_dhellam.search.report.outcomes import Outcome, gains, time_text
from lightning_dhellam.search.report.page.changes import of_search
from lightning_dhellam.search.report.page.values import (
    BarRow,
    Bars,
    Group,
    Overlap,
    Page,
    Table,
    View,
    plan_view,
)
from lightning_dhellam.search.report.pictures import LEAST, hidden_shares
from lightning_dhellam.search.solve import ModelSolution


class Searched(Protocol):
    """What a search has found: `Findings`."""

    @property
    def profile(self) -> Profile:
        """Measured times of the operators."""

    @property
    def solution(self) -> ModelSolution:
        """Plans of the solver."""

    @property
    def plans(self) -> PlanFile:
        """Plans of the winner."""

    @property
    def outcomes(self) -> Sequence[Outcome]:
        """What the trial of each candidate gave."""

    @property
    def winner(self) -> str:
        """The candidate that is used."""

    @property
    def reason(self) -> str:
        """Why it is used."""

    @property
    def predicted(self) -> Mapping[str, Simulation]:
        """Simulated step of each candidate."""

    @property
    def seconds(self) -> Mapping[str, float]:
        """Wall time of each part of the search."""

    @property
    def remarks(self) -> Sequence[str]:
        """How good the plans are."""


def search_page(found: Searched, timelines: Sequence[View], mark: str = "") -> Page:
    """The page of a search with some timelines. `mark` is said behind the title."""
    fingerprint = found.profile.fingerprint
    facts = {
        "device": fingerprint.device,
        "ranks": ", ".join(f"{name} {size}" for name, size in fingerprint.sizes.items()),
        "shapes": ", ".join(f"{name} {size:,}" for name, size in fingerprint.shapes.items()),
        "dtype": fingerprint.dtype,
        "search": ", ".join(f"{part} {time_text(s)}" for part, s in found.seconds.items()),
    }
    won = next(outcome for outcome in found.outcomes if outcome.name == found.winner)
    return Page(
        f"Search of a plan{mark}",
        {name: value for name, value in facts.items() if value},
        [
            f"Installed: '{found.winner}', {found.reason}.",
            *(line.strip() for line in gains(found.outcomes, found.winner)),
            *(line.strip() for line in found.remarks),
        ],
        timelines,
        [plan_view(_kind(found.plans, kind), plan) for kind, plan in found.plans.plans.items()],
        [_candidates(found), _memory(found)],
        _overlap(found.profile),
        of_search(won, found.outcomes, found.predicted[found.winner], found.solution.main),
    )


def _kind(plans: PlanFile, kind: tuple[str, str]) -> str:
    names = [plans.graphs.get(fingerprint, fingerprint) for fingerprint in kind if fingerprint]
    return ", ".join(names)


def _candidates(found: Searched) -> Group:
    ranked = sorted(found.outcomes, key=lambda outcome: outcome.time)
    best = [outcome.name for outcome in ranked].index(found.winner)
    lanes = [lane for lane in Lane if any(lane in outcome.exposed for outcome in ranked)]
    head = ("plan", "predicted", "measured", "noise", "error", "exposed")
    rows = [
        (
            outcome.name,
            time_text(outcome.predicted),
            "–" if outcome.measured is None else time_text(outcome.measured),
            f"± {time_text(outcome.spread)}" if outcome.spread else "–",
            "–" if outcome.error is None else f"{outcome.error:+.1%}",
            f"{sum(outcome.exposed.values()) / outcome.predicted:.1%}",
        )
        for outcome in ranked
    ]
    bars = [
        BarRow(
            outcome.name,
            [
                outcome.predicted - sum(outcome.exposed.values()),
                *(outcome.exposed.get(lane, 0.0) for lane in lanes),
            ],
            time_text(outcome.predicted),
            outcome.measured,
        )
        for outcome in ranked
    ]
    parts = ["compute, with what it hides", *(f"exposed {lane}" for lane in lanes)]
    marked = "measured" if any(outcome.measured for outcome in ranked) else ""
    return Group(
        "Candidates",
        [Table(head, rows, tuple(range(1, len(head))), best)],
        [Bars("Predicted step", parts, bars, marked, best=best)],
        wide=True,
    )


def _memory(found: Searched) -> Group:
    names = list(found.predicted)
    rows = [
        BarRow(name, [step.peak_bytes], f"{step.peak_bytes / 2**20:,.1f} MiB")
        for name, step in found.predicted.items()
    ]
    bars = Bars("Most that slots take at once", ["slots"], rows, best=names.index(found.winner))
    return Group("Memory", bars=[bars])


def _overlap(profile: Profile) -> Overlap | None:
    rows, columns, shares = hidden_shares(profile, LEAST)
    known = [[None if isnan(s) else round(float(s), 4) for s in row] for row in shares]
    seen = [j for j in range(len(columns)) if any(row[j] is not None for row in known)]
    if not seen:
        return None
    return Overlap(
        [_short(key) for key in rows],
        [_short(columns[j]) for j in seen],
        [[row[j] for j in seen] for row in known],
    )


def _short(key: str) -> str:
    return key.rsplit("/", 1)[-1]
