"""A search on a runner: profile, solve, try the candidates on steps, choose, install."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_dhellam.autosearch.exchanges import Taken, take_fastest
from lightning_dhellam.autosearch.profiling import (
    fingerprint,
    of_stage,
    routings_of,
    take_profile,
    versions,
)
from lightning_dhellam.autosearch.reductions import Reduction
from lightning_dhellam.autosearch.schedules import ScheduleSearch, room_of
from lightning_dhellam.autosearch.timing import Stopwatch, intervals
from lightning_dhellam.autosearch.transfers import take_transfers
from lightning_dhellam.engine import Span
from lightning_dhellam.files import FileError
from lightning_dhellam.hosted import Ending
from lightning_dhellam.parallel.collectives import largest, of_all_ranks, together
from lightning_dhellam.plan import BUILDERS, Builder, Graph, Kind, Lane
from lightning_dhellam.plan.file import PlanFile, named_plan
from lightning_dhellam.recomputing import measured_bytes, when_measured
from lightning_dhellam.runner import Runner
from lightning_dhellam.search.measure import Fingerprint, Profile, Progress, Trials
from lightning_dhellam.search.model import Costs, Reductions, Simulation, simulate
from lightning_dhellam.search.pipeline import FoldedStep, VisitTable, links_of
from lightning_dhellam.search.report import Findings, Outcome, choose, measured
from lightning_dhellam.search.solve import ModelSolution, peak_bytes, solve

REFERENCE = "sequential"
MEMORY_SLACK = 0.025
"""Share of the memory of a step that the slots of a searched plan may take more than those of the
sequential one."""


@dataclass(frozen=True)
class Options:
    """How to search.

    Attributes:
        rounds: steps that each candidate is measured on.
        profile: file that holds the profile, or will.
        memory_limit: bytes that slots take at once in a pair of layers; None for what the
            sequential plan needs and `memory_slack`.
        memory_slack: share of the memory of a step.
        plans: whether plans are searched; or else the given one stays.
        schedules: whether schedules of the pipeline are.
    """

    rounds: int = 5
    profile: Path | None = None
    memory_limit: float | None = None
    memory_slack: float = MEMORY_SLACK
    plans: bool = True
    schedules: bool = False


class Session:
    """A search on one rank. Every rank runs the same.

    `begin` profiles and solves, between two steps of which the first one showed a batch; `step`
    then surrounds each of the steps that follow, until `findings` are there.

    Args:
        runner: that trains.
        options: how to search.
        ending: tells whether the process is to end, which it then does before the search is over.

    Attributes:
        left_out: plans that are not tried since they need more than the given memory limit, and
            the bytes that they need. `sequential`, to which all are compared, is always tried.
        skipped: steps in a row that said nothing, since their batches had another size.
        exchange: the way for keys and values that it has chosen; empty if there was no choice.
        findings: what the search has found; None until it is over.
    """

    def __init__(self, runner: Runner, options: Options, ending: Ending | None = None) -> None:
        self._runner = runner
        self._options = options
        self._ending = ending
        self._seconds: dict[str, float] = {}
        self._winner = ""
        self._reason = ""
        self._outcomes: list[Outcome] = []
        self._to_trace: list[str] = []
        self._spans: dict[str, list[Span]] = {}
        self._schedules: ScheduleSearch | None = None
        self.exchange = ""
        self.left_out: dict[str, float] = {}
        self.findings: Findings | None = None
        self.skipped = 0

    def begin(self, batch: Mapping[str, Any], progress: Progress | None = None) -> None:
        """Profile and solve.

        Args:
            batch: of this rank, of the size of all that are to be measured.
            progress: is told of the profile's measurements.

        Raises:
            BenchError: an operator could not be timed; it is named.
            FileError: the given profile was made for something else.
            ValueError: no order keeps the memory limit.
            SIGTERMException: a rank was told to end; on all of them.
        """
        runner, options = self._runner, self._options
        self._pieces = runner.intake.micro_batches(batch)
        self._shapes = _shapes(batch)
        stage = runner.engine.stage
        self._stage = FoldedStep(stage.number, stage.count, len(self._pieces), stage.scheme)
        # Before the profile, which needs memory that no step does.
        slack = None if options.memory_limit else self._peak_bytes() * options.memory_slack
        if options.schedules:
            self._schedules = ScheduleSearch(runner, options.rounds, room_of(runner))
        if runner.agreed.undecided:
            if options.profile is not None:
                raise ValueError(
                    f"profile={options.profile} is of one choice of what backward makes again, and"
                    " recompute='auto' makes one: give recompute, or leave profile out"
                )
            held = measured_bytes(runner.agreed, runner.model_states.total)
        everyone = runner.context.world_group
        measuring = partial(self._measuring, progress)
        limit = options.memory_limit
        if len(runner.agreed.exchanges) > 1:
            if options.profile is not None:
                raise ValueError(
                    f"profile={options.profile} is of one way of keys and values, and"
                    " context_exchange='auto' compares several: give context_exchange="
                    f"{' or '.join(map(repr, runner.agreed.exchanges))}"
                )
            with self._timed("exchange"):
                taken = self._take_exchange(measuring, slack)
            self.exchange, self._profile, limit = taken
        else:
            with self._timed("profile"):
                self._profile = together(lambda: self._profiled(measuring), everyone)
        if runner.agreed.undecided:
            with self._timed("recompute"):
                self._choose_recompute(held)
            with self._timed("profile"):
                self._profile = together(lambda: self._profiled(measuring), everyone)
        with self._timed("solve"):

            def solve_or_end() -> None:
                with self._ending_at_once():
                    self._solve(limit, slack if limit is None else None)

            together(solve_or_end, everyone)
            self._agree()
        self._trials = Trials(tuple(self._builders) if options.plans else (), options.rounds)
        self._began = time.perf_counter()
        if not options.plans:
            self._choose()

    @property
    def steps_left(self) -> int:
        """Training steps that the search still needs at least."""
        return self._trials.left + (self._schedules.left if self._schedules is not None else 0)

    @property
    def candidates(self) -> tuple[str, ...]:
        """Names of the plans that are tried."""
        return tuple(self._builders)

    @contextmanager
    def step(self, batch: Mapping[str, Any]) -> Iterator[Callable[[], None]]:
        """Surround a training step. Gives what to call when its gradients are there."""
        walking = not self._trials.left and self._schedules is not None and self._schedules.left > 0
        if walking:
            assert self._schedules is not None
            self._schedules.follow_next()
        else:
            name = self._trials.next() if self._trials.left else self._to_trace[0]
            self._runner.use_plan(name, self._builders[name])
        watch = Stopwatch(self._runner.device)
        with ExitStack() as stack:
            if not self.steps_left:
                engine = self._runner.engine
                tracer = stack.enter_context(engine.traced(self._runner.device))
            watch.start()
            yield watch.stop
        counts = _shapes(batch) == self._shapes and watch.stopped
        if not all(of_all_ranks(counts, self._runner.context.world_group)):
            self.skipped += 1
            return  # of another size, or skipped, on some rank: it says nothing
        self.skipped = 0
        if walking:
            assert self._schedules is not None
            self._schedules.add(watch.seconds)
        elif self._trials.left:
            self._trials.add(watch.seconds)
            if not self._trials.left:
                self._choose()
        else:
            self._spans[name] = tracer.spans()
            self._to_trace.remove(name)
        if not self.steps_left and not self._to_trace:
            self._finish()

    def stop(self) -> None:
        """Training ends now: choose from what has been measured, if that is a whole round."""
        if self._outcomes or self._trials.counted:
            if not self._outcomes:
                self._schedules = None  # there are no steps left to try any on
                self._choose()
            if self._schedules is not None and self._schedules.chosen is None:
                self._schedules.stop()
            self._finish()
        else:
            use_unsearched(self._runner)

    def leave(self) -> None:
        """Another search begins, or none: nothing that was on trial stays in use but the plan."""
        if self._schedules is not None:
            self._schedules.leave()

    def _ending_at_once(self) -> AbstractContextManager[None]:
        return self._ending.ending_at_once() if self._ending is not None else nullcontext()

    def _take_exchange(self, progress: Progress | None, slack: float | None) -> Taken:
        reduction = Reduction.of(self._runner.gradient_buffers)
        return take_fastest(
            self._runner,
            self._pieces,
            partial(self._measure, progress, reduction),
            tokens=self._tokens,
            memory_limit=self._options.memory_limit,
            memory_slack=slack,
            ending=self._ending_at_once,
        )

    def _choose_recompute(self, held: float) -> None:
        """Let backward make again what the memory asks for, by the times that were measured."""
        runner = self._runner
        costs = Costs.of(self._profile)
        when_measured(runner.agreed, self._pieces, runner.memory_limit, held, costs)

    def _measure(self, progress: Progress | None, reduction: Reduction | None = None) -> Profile:
        engine, everyone = self._runner.engine, self._runner.context.world_group
        profile = take_profile(
            engine,
            self._pieces[0],
            self._made_for,
            group=self._group,
            progress=progress,
            reduction=reduction,
            others=routings_of(engine, self._pieces, everyone),
        )
        transfers = take_transfers(engine, self._runner.context, self._tokens)
        return replace(profile, transfers=transfers)

    @property
    def _group(self) -> dist.ProcessGroup | None:
        return self._runner.context.stage_group

    @property
    def _made_for(self) -> Fingerprint:
        agreed = self._runner.agreed
        return fingerprint(agreed.engine, self._pieces[0], agreed.conditions, agreed.kernels.names)

    @cached_property
    def _tokens(self) -> int:
        """Tokens of a micro-batch: ranks may have other batches, but need the same plan."""
        most = torch.tensor([float(self._pieces[0].tokens)])
        return int(largest(most, self._group))

    def _measuring(self, progress: Progress | None, done: int, total: int, label: str) -> None:
        """Between two measurements, at the same ones on all ranks that measure together."""
        if self._ending is not None:
            told = torch.tensor([float(self._ending.is_told_to_end())])
            if largest(told, self._group).item():
                raise SIGTERMException
        if progress is not None:
            progress(done, total, label)

    def _profiled(self, progress: Progress | None) -> Profile:
        """The profile file of this stage's first rank, or else a new one, which is saved there."""
        runner, group = self._runner, self._group
        path = of_stage(self._options.profile, runner.context)
        given: Profile | str | None = None
        if path is not None and runner.context.topology.rank_in_stage == 0 and path.exists():
            try:
                given = Profile.load(path, self._made_for)
            except FileError as error:
                given = str(error)
        given = of_all_ranks(given, group)[0]
        refusal = given if isinstance(given, str) else ""
        refused = [text for text in of_all_ranks(refusal, runner.context.world_group) if text]
        if refused:
            raise FileError(refused[0])
        # Stages measure together, or none does: what operators read comes from another stage.
        if all(of_all_ranks(given is not None, runner.context.world_group)):
            assert isinstance(given, Profile)
            return given
        profile = self._measure(progress, Reduction.of(runner.gradient_buffers))
        if path is not None and runner.context.topology.rank_in_stage == 0:
            profile.save(path)
        return profile

    def _solve(self, limit: float | None, slack: float | None) -> None:
        layers = self._runner.engine.layers
        costs = Costs.of(self._profile)
        tokens = self._tokens
        # Stages try the same plans, also one that has no GEMM to spare.
        some = torch.tensor([float(bool(costs.sparable))])
        spares = bool(largest(some, self._runner.context.world_group))
        self._solution: ModelSolution = solve(
            layers, costs, tokens=tokens, memory_limit=limit, memory_slack=slack
        )
        published = solve(layers, costs, algorithm="pairs", tokens=tokens)
        self._builders: dict[str, Builder] = {
            **BUILDERS,
            "pairs": published.builder(),
            "auto": self._solution.builder(),
        }
        if spares:
            # The other end of what `auto` chooses from, should it choose wrongly.
            everywhere = costs.sparing(costs.sparable)
            spare = solve(layers, everywhere, tokens=tokens, memory_limit=limit, memory_slack=slack)
            self._builders["spare"] = spare.builder()
        given = self._runner.plan
        if given not in self._builders:
            self._builders[given] = named_plan(given, self._runner.agreed.conditions)
        if not self._options.plans:
            self._builders = {given: self._builders[given]}
        given_limit = self._options.memory_limit
        if given_limit is not None:
            needs = {
                name: peak_bytes(layers, builder, costs, tokens=tokens)
                for name, builder in self._builders.items()
                if name != REFERENCE
            }
            self.left_out = {name: peak for name, peak in needs.items() if peak > given_limit}
        reductions = self._reductions()
        self._predicted: dict[str, Simulation] = {
            name: simulate(
                layers,
                builder,
                costs,
                micro_batches=len(self._pieces),
                tokens=tokens,
                reductions=reductions,
            )
            for name, builder in self._builders.items()
        }
        self._visits = (
            {name: self._costs_of(name, costs, tokens) for name in self._builders}
            if self._runner.context.topology.pp_size > 1
            else {}
        )

    def _reductions(self) -> Reductions | None:
        """What data-parallel ranks reduce in a step; nothing in a pipeline, whose visits know of
        no reduction."""
        reduction = Reduction.of(self._runner.gradient_buffers)
        if reduction is None or self._runner.context.topology.pp_size > 1:
            return None
        return reduction.of_step(self._runner.engine, self._profile)

    def _costs_of(self, name: str, costs: Costs, tokens: int) -> VisitTable:
        """What the visits of this stage cost under a plan."""
        layers = self._runner.engine.layers
        chunks = self._runner.engine.stage.chunks
        return self._stage.visits(
            {chunk: [layers[i] for i in own] for chunk, own in chunks.items()},
            self._builders[name],
            costs,
            busy=self._predicted[name].utilisation[Lane.COMPUTE],
            tokens=tokens,
        )

    def _agree(self) -> None:
        """Stages have layers of their own: what one leaves out, none tries, and a step takes as
        long as all of them together."""
        self._step_seconds = {name: step.seconds for name, step in self._predicted.items()}
        if self._runner.context.topology.pp_size > 1:
            links = links_of(self._profile.transfers)
            known = of_all_ranks(
                (self.left_out, self._visits, links), self._runner.context.groups.pp
            )
            every = {edge: link for *_, own in known for edge, link in own.items()}
            for name in self._builders:
                peaks = [left_out[name] for left_out, *_ in known if name in left_out]
                if peaks:
                    self.left_out[name] = max(peaks)
                visits = [row[1][name] for row in known]
                self._step_seconds[name] = self._stage.seconds(visits, every)
        for name in self.left_out:
            del self._builders[name], self._predicted[name]

    def _peak_bytes(self) -> float:
        """Most memory in use so far, on the rank that used most; of slots alone on CPU."""
        device = self._runner.device
        if device.type == "cuda":
            mine = float(torch.cuda.max_memory_allocated(device))
        else:
            mine = float(self._runner.engine.lanes.ledger.peak_bytes)
        return float(largest(torch.tensor([mine]).double(), self._runner.context.stage_group))

    def _choose(self) -> None:
        predicted = [
            Outcome(name, self._step_seconds[name], self._predicted[name].exposed)
            for name in self._builders
        ]
        if self._options.plans:
            table = torch.tensor(self._trials.table(), dtype=torch.float64)
            table = largest(table, self._runner.context.world_group)
            self._outcomes = measured(predicted, table.tolist())
            winner, self._reason = choose(self._outcomes, REFERENCE)
        else:
            self._outcomes, winner, self._reason = predicted, predicted[0], "as given"
        if self.exchange:
            self._reason += f"; keys and values come by {self.exchange}"
        self._winner = winner.name
        self._to_trace = list(dict.fromkeys((self._reference, self._winner)))
        self._seconds["trials"] = time.perf_counter() - self._began
        if self._schedules is not None:
            self._runner.use_plan(self._winner, self._builders[self._winner])
            with self._timed("schedules"):
                self._schedules.begin(
                    Costs.of(self._profile),
                    self._builders[self._winner],
                    links_of(self._profile.transfers),
                    busy=self._predicted[self._winner].utilisation[Lane.COMPUTE],
                    tokens=self._tokens,
                    count=len(self._pieces),
                )

    @property
    def _reference(self) -> str:
        """What the winner is compared with: without a search it is itself."""
        return REFERENCE if self._options.plans else self._winner

    def _finish(self) -> None:
        self._runner.use_plan(self._winner, self._builders[self._winner])
        self.findings = Findings(
            self._profile,
            self._solution,
            self._plan_file(),
            self._outcomes,
            self._winner,
            self._reason,
            self._predicted,
            {name: intervals(spans) for name, spans in self._spans.items()},
            self._seconds,
            self._reference,
            self._schedules.chosen if self._schedules is not None else None,
        )

    def _plan_file(self) -> PlanFile:
        graphs: dict[str, Graph] = {}
        for pair in self._runner.engine.layers:
            for graph in (pair.forward, pair.backward):
                graphs[graph.fingerprint] = graph
        builder = self._builders[self._winner]
        kinds: Sequence[Kind] = list(self._solution.solutions)
        mine = PlanFile.of(
            {(f, b): builder(graphs.get(f), graphs.get(b)) for f, b in kinds},
            graphs.values(),
            conditions=self._runner.agreed.conditions,
            versions=versions(),
            notes={
                "plan": self._winner,
                "reason": self._reason,
                "step_ms": {
                    o.name: {"predicted": o.predicted * 1e3, "measured": (o.measured or 0) * 1e3}
                    for o in self._outcomes
                },
            },
        )
        # Other stages have pairs of graphs that this one has not.
        plans, names = dict(mine.plans), dict(mine.graphs)
        for more, others in of_all_ranks((plans, names), self._runner.context.world_group):
            plans, names = {**more, **plans}, {**others, **names}
        chosen = self._runner.agreed.chosen
        walked = self._schedules.chosen if self._schedules is not None else None
        return replace(
            mine,
            plans=plans,
            graphs=names,
            recompute=chosen or {},
            schedule=walked.kept if walked is not None else {},
        )

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[part] = time.perf_counter() - start


def use_unsearched(runner: Runner) -> None:
    """Where nothing can be chosen: use the plan that the runner began with."""
    runner.use_plan(runner.plan, named_plan(runner.plan, runner.agreed.conditions))


def _shapes(batch: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(batch["tokens"].shape)
