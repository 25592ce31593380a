"""Our side of `dhellam bench several`: one model, by one plan after the other, and by schedules.

A profile of its operators predicts the step of each. `auto` is the plan that a search finds with
it, and of schedules the fastest of those that were predicted best: what `plan="auto"` and
`schedule="auto"` come to in a run. Each row is told as soon as it is measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lightning_dhellam.autosearch.exchanges import take_fastest
from lightning_dhellam.autosearch.options import MEMORY_SLACK
from lightning_dhellam.autosearch.profiling import of_stage, versions
from lightning_dhellam.autosearch.schedules import TRIED, Forecast, forecast
from lightning_dhellam.bench.plans import PLANS, Plans, budget_within
from lightning_dhellam.bench.scheduling import Measured, profile_of
from lightning_dhellam.bench.several.job import AUTO, OURS, PLAN, Job
from lightning_dhellam.bench.several.steps import Note, Watch, timed
from lightning_dhellam.bench.several.training import Training, runner_of
from lightning_dhellam.parallel.collectives import largest
from lightning_dhellam.pipeline.schedules import Scheme, scheme_of
from lightning_dhellam.plan import Builder, Graph, kind_of
from lightning_dhellam.plan.file import PlanFile, named_plan
from lightning_dhellam.runner import Runner
from lightning_dhellam.search.measure import Profile
from lightning_dhellam.search.model import step_stops
from lightning_dhellam.search.pipeline import SEARCHED, Effort


def measure(job: Job, device: torch.device, note: Note, folder: Path) -> None:
    """Train some steps by each plan and schedule, and note times, predictions, loss and norm."""
    watch = Watch()
    with runner_of(job, device) as runner:
        training = Training(job, runner)
        training.take(job.counts[0])
        phases = {"model": watch.lap()}
        training.step()
        phases["first step"] = watch.lap()
        slack = _peak_bytes(runner) * MEMORY_SLACK
        known, exchange, limit = _profiled(job, training, slack)
        profile = of_stage(folder / "profile.json", runner.context)
        if profile is not None and runner.context.topology.rank_in_stage == 0:
            known.profile.save(profile)
        phases["profile"] = watch.lap()
        builders = _builders(job, runner, known, slack, limit, folder)
        phases["search"] = watch.lap()
        shared: dict[str, Any] = {
            "layers": runner.model.config.num_layers,
            "transfers": [asdict(row) for row in known.profile.transfers],
            "link": _measured_link(job, known.profile, runner),
            "carried": {lane.value: why for lane, why in runner.context.carried.items()},
            "phases": phases,
        }
        if exchange:
            shared["exchange"] = exchange
        rows = _Rows(job, training, known, note, folder)
        for count in job.counts:
            training.take(count)
            rows.of_plans(builders, {**shared, "micro-batches": count})
            if job.schedules:
                rows.of_schedules({**shared, "micro-batches": count})


def _peak_bytes(runner: Runner) -> float:
    """Most memory in use so far, on the rank of this stage that used most; on a CPU of slots."""
    if runner.device.type == "cuda":
        mine = float(torch.cuda.max_memory_allocated(runner.device))
    else:
        mine = float(runner.engine.lanes.ledger.peak_bytes)
    return float(largest(torch.tensor([mine]).double(), runner.context.stage_group))


def _profiled(job: Job, training: Training, slack: float) -> tuple[Measured, str, float | None]:
    """What operators take, by the faster way of keys and values; that way, and the bytes that its
    plans may take, where there is a choice."""
    runner, batch = training.runner, training.batch
    if len(runner.agreed.exchanges) == 1:
        return Measured.of(runner, batch, job.repeats), "", None
    pieces = runner.intake.micro_batches(batch)
    taken = take_fastest(
        runner,
        pieces,
        partial(profile_of, runner, batch, job.repeats),
        tokens=pieces[0].tokens,
        memory_limit=None,
        memory_slack=slack,
        ending=nullcontext,
    )
    return Measured.by(taken.profile, runner, batch), taken.name, taken.memory_limit


def _builders(
    job: Job, runner: Runner, known: Measured, slack: float, limit: float | None, folder: Path
) -> dict[str, Builder]:
    """What makes each plan that the job asks for. Every rank finds the same."""
    layers, costs = runner.engine.layers, known.costs
    budget = budget_within(
        job.search_time,
        layers,
        costs,
        tokens=known.tokens,
        memory_slack=slack,
        group=runner.context.world_group,
    )
    names = [name for name in job.plans if name in PLANS]
    plans = Plans.of(
        layers,
        costs,
        names,
        tokens=known.tokens,
        memory_limit=limit,
        memory_slack=slack if limit is None else None,
        budget=budget,
    )
    given = [name for name in job.plans if name.endswith(".json")]
    return {**plans.builders, **{name: _given(name, folder) for name in given}}


def _given(plan: str, folder: Path) -> Builder:
    """The plans of a file of another run, whose conditions, such as real links, need not be met."""
    copy = folder / "given.json"
    replace(PlanFile.load(plan), conditions={}).save(copy)
    return named_plan(str(copy))


class _Rows:
    """Measures rows, and notes each at once."""

    def __init__(
        self, job: Job, training: Training, known: Measured, note: Note, folder: Path
    ) -> None:
        self._job = job
        self._training = training
        self._runner = training.runner
        self._known = known
        self._note = note
        self._folder = folder
        self._fastest: tuple[float, str, Builder] | None = None

    def of_plans(self, builders: Mapping[str, Builder], shared: Mapping[str, Any]) -> None:
        """Measure each plan once, by the schedule that the run has begun with."""
        runner = self._runner
        for name, builder in builders.items():
            runner.use_plan(name, builder)
            self._training.settle()
            predicted = self._predicted(builder)
            row = self._timed() | {"row": name, "plan": name, "predicted": predicted}
            self._note({**shared, **row})
            if self._fastest is None or row["seconds"] < self._fastest[0]:
                self._fastest = row["seconds"], name, builder
                if runner.context.topology.pp_size == 1 and runner.context.topology.rank == 0:
                    _plan_file(runner, name, builder).save(self._folder / PLAN)

    def of_schedules(self, shared: Mapping[str, Any]) -> None:
        """Measure each schedule once, `auto` with those that it chooses from as the last.

        By the plan that was fastest, or the one that was given.
        """
        watch = Watch()
        name, builder = self._job.plan, self._known.builder
        if self._fastest is not None:
            _, name, builder = self._fastest
        self._runner.use_plan(name, builder)
        forecast = self._forecast(builder, Effort() if AUTO in self._job.schedules else None)
        shared = {**shared, "plan": name, "search s": watch.lap()}
        stages, found = self._runner.engine.stage.count, dict[str, dict[str, Any]]()
        wanted = {one: partial(scheme_of, one, stages) for one in self._job.schedules}
        wanted.pop(AUTO, None)
        for one, make in wanted.items():
            found[one] = {**shared, **self._by_schedule(one, make(), forecast)}
            self._note(found[one])
        if AUTO in self._job.schedules:
            self._choose(forecast, found, shared)

    def _choose(
        self, known: Forecast, found: dict[str, dict[str, Any]], shared: Mapping[str, Any]
    ) -> None:
        rivals = known.fitting[:TRIED] or tuple(known.ranking)[:1]
        for one in rivals:
            if one not in found:
                found[one] = {**shared, **self._by_schedule(one, known.schemes[one], known)}
        best = min(rivals, key=lambda one: float(found[one]["seconds"]))
        reasons = {one: ranked.reason for one, ranked in known.ranking.items()}
        detail = {"installed": best, "behind": reasons}
        if SEARCHED in known.schemes:
            made = known.schemes[SEARCHED](self._runner.engine.stage.count, self._training.count)
            detail["searched"] = str(made)
        named = {"row": f"{OURS}:{AUTO}", "schedule": f"{AUTO}: {best}"}
        self._note({**found[best], **named, **detail})

    def _by_schedule(self, name: str, scheme: Scheme, known: Forecast) -> dict[str, Any]:
        self._runner.use_schedule(name, scheme)
        self._training.settle()
        played = known.ranking.get(name)
        predicted = played.run.seconds if played is not None else None
        row = {"row": f"{OURS}:{name}", "schedule": name, "predicted": predicted}
        return {**self._timed(), **row}

    def _timed(self) -> dict[str, Any]:
        steps = self._job.steps_of(self._training.count)
        return timed(self._training.side, self._runner.device, steps)

    def _predicted(self, builder: Builder) -> float:
        """Seconds of a step by a plan: of all stages together, by the schedule in use."""
        if self._runner.context.topology.pp_size == 1:
            return self._known.step(self._runner, self._training.count, builder).seconds
        return self._forecast(builder).ranking[self._runner.agreed.schedule].run.seconds

    def _forecast(self, builder: Builder, effort: Effort | None = None) -> Forecast:
        known, runner, count = self._known, self._runner, self._training.count
        return forecast(
            runner,
            known.costs,
            builder,
            busy=known.busy(runner, count, builder),
            tokens=known.tokens,
            micro_batches=count,
            links=known.links,
            effort=effort,
        )


def _plan_file(runner: Runner, name: str, builder: Builder) -> PlanFile:
    graphs: dict[str, Graph] = {}
    for pair in runner.engine.layers:
        graphs |= {graph.fingerprint: graph for graph in (pair.forward, pair.backward)}
    stops = (stop.graphs for stop in step_stops(runner.engine.layers, 3))
    plans = {kind_of(*both): builder(*both) for both in stops}
    return PlanFile.of(
        plans,
        graphs.values(),
        conditions=runner.agreed.conditions,
        versions=versions(),
        notes={"plan": name},
    )


def _measured_link(job: Job, profile: Profile, runner: Runner) -> dict[str, float] | None:
    """Bytes that cross the link for a gather, the seconds that it takes alone, and on what."""
    alone = {row.operator: row.median for row in profile.timings if row.partner is None}
    for keys in profile.operators.values():
        if "qkv.gather" in keys:
            tokens = job.length * job.micro_batch
            itemsize = 2 if profile.fingerprint.dtype == "bfloat16" else 4
            whole = itemsize * runner.model.config.hidden_size * tokens
            crossing = whole * (job.tensor - 1) / job.tensor
            sms = runner.engine.lanes.processors
            return {"bytes": crossing, "seconds": alone[keys["qkv.gather"]], "sms": sms}
    return None
