"""The schedule of a run: what a step would take under each, and which is best on real steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lightning_dhellam.memory.fitting import KNOWN_SHARE
from lightning_dhellam.memory.limit import limit_of
from lightning_dhellam.parallel.collectives import largest, of_all_ranks
from lightning_dhellam.pipeline.schedules import (
    Found,
    ScheduleError,
    Scheme,
    kept,
    playable,
)
from lightning_dhellam.plan import Builder
from lightning_dhellam.recomputing import measured_bytes
from lightning_dhellam.runner import Runner
from lightning_dhellam.search.measure import Trials
from lightning_dhellam.search.model import Costs
from lightning_dhellam.search.pipeline import (
    SEARCHED,
    Effort,
    Links,
    PipelineStep,
    Ranked,
    VisitTable,
    play,
    ranked,
    searched,
)
from lightning_dhellam.search.report import Outcome, Walked, choose, measured

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
    links: Links | None = None,
    room: float | None = None,
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
        links: that lead away from this stage; transfers are free where none is known.
        room: bytes that saved activations of this stage may take more than they do under the
            schedule that is in use; None if there is no limit.
        effort: how long to search; None if nothing is to be searched.
    """
    stage, layers = runner.engine.stage, runner.engine.layers
    own = {chunk: [layers[i] for i in held] for chunk, held in stage.chunks.items()}
    schemes = playable(stage.placement) | {runner.agreed.schedule: stage.scheme}
    steps = {
        name: PipelineStep(stage.number, stage.count, micro_batches, scheme)
        for name, scheme in schemes.items()
    }
    fullest = max(steps, key=lambda name: steps[name].fill)
    tables = {
        name: step.visits(own, builder, costs, busy=busy, tokens=tokens)
        for name, step in steps.items()
    }
    kinds = steps[fullest].visits(own, builder, costs, busy=busy, tokens=tokens, of_any=True)
    known = of_all_ranks((tables, kinds, room, links or {}), runner.context.groups.pp)
    every = {edge: link for *_, own_links in known for edge, link in own_links.items()}
    runs = {
        name: play(step.schedule, VisitTable.joined(row[0][name] for row in known), every)
        for name, step in steps.items()
    }
    limits = [
        row[2] + use.peak
        for row, use in zip(known, runs[runner.agreed.schedule].stages, strict=True)
        if row[2] is not None
    ]
    if effort is not None:
        table = VisitTable.joined(row[1] for row in known)
        try:
            found = searched(
                stage.placement,
                micro_batches,
                table,
                every,
                limits=limits,
                known=[step.schedule for step in steps.values()],
                effort=effort,
            )
        except ScheduleError:
            pass  # nothing keeps the limits
        else:
            # Steps of another number of micro-batches must keep the limits as well.
            best = next(name for name in ranked(runs, limits) if name != SEARCHED)
            schemes[SEARCHED] = Found(found, schemes[best])
            runs[SEARCHED] = play(found, table, every)
    return Forecast(ranked(runs, limits), schemes)


def room_of(runner: Runner) -> float | None:
    """Return the bytes that this stage's activations may take more than they have taken so far.

    It is that of the rank that has least; negative if it takes more than it may, and None if there
    is no limit. Every rank must call this, after a step and before a profile.
    """
    limit = limit_of(runner.device, runner.memory_limit)
    if limit is None:
        return None
    held = measured_bytes(runner.agreed, runner.model_states.total)
    taken = held + runner.engine.lanes.ledger.peak_bytes
    over = torch.tensor([taken - KNOWN_SHARE * limit], dtype=torch.float64)
    return -float(largest(over, runner.context.stage_group))


class ScheduleSearch:
    """Tries the schedules that are predicted best on real steps, and installs the fastest.

    Every rank runs the same.

    Args:
        runner: that trains.
        rounds: steps that each is measured on.
        room: see `forecast`.

    Attributes:
        chosen: what was chosen; None before.
    """

    def __init__(self, runner: Runner, rounds: int, room: float | None) -> None:
        self._runner = runner
        self._rounds = rounds
        self._room = room
        self._forecast: Forecast | None = None
        self._trials: Trials | None = None
        self._others: Mapping[str, str] = {}
        self._first = runner.agreed.schedule
        self.chosen: Walked | None = None

    @property
    def left(self) -> int:
        """Steps that it still needs; at most, before `begin`."""
        return self._trials.left if self._trials is not None else (self._rounds + 1) * TRIED

    def begin(
        self,
        costs: Costs,
        builder: Builder,
        links: Links,
        *,
        busy: float,
        tokens: int,
        count: int,
        others: Mapping[str, str] | None = None,
    ) -> None:
        """Predict all schedules for steps of `count` micro-batches; see `forecast`.

        `others` are schedules that cannot be tried, and why; see `elsewhere`.
        """
        runner, self._others = self._runner, others or {}
        self._forecast = forecast(
            runner,
            costs,
            builder,
            busy=busy,
            tokens=tokens,
            micro_batches=count,
            links=links,
            room=self._room,
            effort=Effort(),
        )
        first = self._first = runner.agreed.schedule
        tried = dict.fromkeys((*self._forecast.fitting[:TRIED], first))
        self._trials = Trials(tuple(tried), self._rounds)
        if len(tried) == 1:  # nothing else keeps the limits
            self._trials = Trials((), self._rounds)
            self._install([], first)

    def follow_next(self) -> None:
        """Let the next step go by the schedule that is to be measured."""
        assert self._trials is not None
        self._use(self._trials.next())

    def add(self, timer: Callable[[], float]) -> None:
        """Note that step; `timer` tells its seconds when asked. After the last one, choose."""
        assert self._trials is not None
        self._trials.add(timer)
        if not self._trials.left:
            self.stop()

    def stop(self) -> None:
        """Choose from what was measured, if that is a whole round; else go on as the run began."""
        if self._trials is None or self._forecast is None:
            return
        if not self._trials.counted:
            self.leave()
            return
        table = torch.tensor(self._trials.table(), dtype=torch.float64)
        table = largest(table, self._runner.context.world_group)
        names = self._trials.candidates
        seconds = {name: self._forecast.ranking[name].run.seconds for name in names}
        outcomes = measured([Outcome(name, seconds[name], {}) for name in names], table.tolist())
        winner, _ = choose(outcomes, self._first)
        self._install(outcomes, winner.name)

    def leave(self) -> None:
        """Let the run go on by the schedule that it began with, whichever was on trial."""
        if self._forecast is not None:
            self._use(self._first)

    def _install(self, outcomes: Sequence[Outcome], name: str) -> None:
        assert self._forecast is not None
        self._use(name)
        why = {other: one.reason for other, one in self._forecast.ranking.items()}
        why |= self._others
        self.chosen = Walked(name, outcomes, why, kept(name, self._forecast.schemes[name]))

    def _use(self, name: str) -> None:
        if self._runner.agreed.schedule != name:
            assert self._forecast is not None
            self._runner.use_schedule(name, self._forecast.schemes[name])
