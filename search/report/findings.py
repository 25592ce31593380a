"""Everything that a search found, and the folder that it is written to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lightning_dhellam.files import put_in_lines, save_text
from lightning_dhellam.plan import Lane, Strand
from lightning_dhellam.plan.file import PlanFile
from lightning_dhellam.search.measure import Profile, range_of
from lightning_dhellam.search.model import Interval, Simulation, Timeline
from lightning_dhellam.search.report.offers import Offer
from lightning_dhellam.search.report.outcomes import Outcome, summary, time_text
from lightning_dhellam.search.report.schedules import Walked
from lightning_dhellam.search.report.trace import save_trace
from lightning_dhellam.search.solve import ModelSolution

_SHOWN = 2
"""Pairs of layers in the picture of a timeline."""


@dataclass(frozen=True)
class Findings:
    """Everything that a search found, ready to be written to a folder.

    Attributes:
        profile: measured times of the operators.
        solution: plans of the solver, with their bounds.
        plans: plans of the winner.
        outcomes: what the trial of each candidate gave.
        winner: name of the candidate that is used.
        reason: why it is used.
        predicted: simulated step of each candidate; in a pipeline, what this stage does in it.
        measured: intervals of a traced real step, of some candidates.
        seconds: wall time of each part of the search.
        reference: plan to compare with in pictures.
        schedule: the pipeline's schedule, if it was searched; with it the outcomes of plans are
            those under the one that the run began with.
        offers: options that were measured and not taken, since they change what is computed.
    """

    profile: Profile
    solution: ModelSolution
    plans: PlanFile
    outcomes: Sequence[Outcome]
    winner: str
    reason: str
    predicted: Mapping[str, Simulation]
    measured: Mapping[str, Sequence[Interval]]
    seconds: Mapping[str, float]
    reference: str = "sequential"
    schedule: Walked | None = None
    offers: Sequence[Offer] = ()

    def __str__(self) -> str:
        spent = ", ".join(f"{part} {time_text(seconds)}" for part, seconds in self.seconds.items())
        return "\n".join(
            (
                f"search on {self.profile.fingerprint.device}: {spent}",
                summary(self.outcomes, self.winner, self.reason),
                *(f"  {remark}" for remark in self.remarks),
            )
        )

    @property
    def remarks(self) -> list[str]:
        """How good the plans are, by which schedule, how far times depend on routings, and what
        options would bring."""
        remarks = [str(self.solution.main)]
        if self.schedule is not None:
            remarks.append(str(self.schedule))
        found = range_of(self.profile)
        if found is not None:
            remarks.append(
                f"by {len(self.profile.routings)} routings of this run what experts do takes"
                f" {found[0]:.2f} to {found[1]:.2f} of its mean"
            )
        return [*remarks, *map(str, self.offers)]

    def metrics(self) -> dict[str, float]:
        """Return numbers for a logger: `search/auto/measured_ms` and the like."""
        found = {f"search/{part}_seconds": seconds for part, seconds in self.seconds.items()}
        most = range_of(self.profile)
        if most is not None:
            found["search/routings_most"] = most[1]
        for outcome in self.outcomes:
            name = f"search/{Path(outcome.name).stem}"
            found[f"{name}/predicted_ms"] = outcome.predicted * 1e3
            found[f"{name}/exposed_ms"] = sum(outcome.exposed.values()) * 1e3
            if outcome.measured is not None:
                found[f"{name}/measured_ms"] = outcome.measured * 1e3
        for offer in self.offers:
            name = f"search/{offer.option.partition('=')[0]}"
            found[f"{name}/predicted_ms"] = offer.seconds * 1e3
            found[f"{name}/gain"] = offer.gain
        for outcome in self.schedule.outcomes if self.schedule is not None else ():
            name = f"search/schedule/{outcome.name}"
            found[f"{name}/predicted_ms"] = outcome.predicted * 1e3
            if outcome.measured is not None:
                found[f"{name}/measured_ms"] = outcome.measured * 1e3
        return found

    def write(self, folder: Path) -> Path:
        """Write profile, plans of the winner, table, trace and pictures to a folder.

        Returns the file of the plans.
        """
        plan_file = folder / "plan.json"
        self.profile.save(folder / "profile.json")
        self.plans.save(plan_file)
        save_text(folder / "summary.txt", f"{self}\n")
        rows = [asdict(outcome) for outcome in self.outcomes]
        found: dict[str, Any] = {
            "winner": self.winner,
            "reason": self.reason,
            "seconds": dict(self.seconds),
        }
        if self.schedule is not None:
            found["schedule"] = {
                "name": self.schedule.name,
                "reasons": dict(self.schedule.reasons),
                "outcomes": [asdict(outcome) for outcome in self.schedule.outcomes],
            }
        if self.offers:
            found["offers"] = [asdict(offer) for offer in self.offers]
        save_text(folder / "outcomes.json", put_in_lines({**found, "outcomes": rows}))
        timelines = {f"{name}, measured": rows for name, rows in self.measured.items()}
        for name in dict.fromkeys((self.reference, self.winner)):
            timelines[f"{name}, predicted"] = self.predicted[name].intervals
        save_trace(folder / "trace.json", timelines)
        self._draw(folder)
        return plan_file

    def _draw(self, folder: Path) -> None:
        # Drawing needs matplotlib, which nothing else here does.
        from lightning_dhellam.search.report import page, pictures

        panels, views = [], []
        mark = " · emulated cluster" if "emulated" in self.profile.fingerprint.device else ""
        for name, is_real in self._shown():
            title = f"{name}, {'measured' if is_real else 'predicted'}{mark}"
            middle, timeline = self._middle(name, is_real), self._timeline(name, is_real)
            panels.append(pictures.Panel(title, timeline.between(*middle)))
            views.append(page.view_of(title, timeline.intervals, middle))
        pictures.save_timeline(folder / "timeline.png", [p for p in panels if p.intervals])
        if any(lane is not Lane.COMPUTE for lane in self.profile.lanes.values()):
            pictures.save_heat_map(folder / "overlap.png", self.profile)
        exposed = {outcome.name: outcome.exposed for outcome in self.outcomes}
        steps = {outcome.name: outcome.predicted for outcome in self.outcomes}
        real = {outcome.name: outcome.measured for outcome in self.outcomes if outcome.measured}
        pictures.save_exposed(folder / "exposed.png", exposed, steps, real)
        page.save_page(folder / "report.html", page.search_page(self, views, mark))

    def _shown(self) -> list[tuple[str, bool]]:
        """The timelines: names of plans, and whether they are of a measured step."""
        names = dict.fromkeys((self.reference, self.winner))
        return [
            (n, real) for n in names for real in (False, True) if not real or n in self.measured
        ]

    def _timeline(self, name: str, real: bool) -> Timeline:
        return Timeline(tuple(self.measured[name] if real else self.predicted[name].intervals))

    def _middle(self, name: str, real: bool) -> tuple[float, float]:
        """Return from when to when some layers in the middle of a step take."""
        rows = self._timeline(name, real).intervals
        layers = 1 + max(row.layer for row in rows)
        busiest = 1 if any(row.micro_batch == 1 for row in rows) else 0

        def begin(layer: int) -> float:
            starts = [
                row.start
                for row in rows
                if row.strand is Strand.FORWARD
                and row.layer == layer
                and row.micro_batch == busiest
            ]
            return min(starts)

        first = max(0, (layers - _SHOWN) // 2)
        start = begin(first)
        stop = begin(first + _SHOWN) if first + _SHOWN < layers else max(row.end for row in rows)
        return start, stop
