"""A search on a runner: profile, solve, try the candidates on steps, choose, install."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from lightning_dhellam.autosearch.candidates import REFERENCE, Candidates
from lightning_dhellam.autosearch.elsewhere import elsewhere
from lightning_dhellam.autosearch.keeping import plan_file
from lightning_dhellam.autosearch.measuring import Measuring
from lightning_dhellam.autosearch.narrower import Memory, offers
from lightning_dhellam.autosearch.options import Options
from lightning_dhellam.autosearch.schedules import ScheduleSearch, room_of
from lightning_dhellam.autosearch.timing import Stopwatch, intervals
from lightning_dhellam.engine import Span
from lightning_dhellam.hosted import Ending
from lightning_dhellam.parallel.collectives import largest, of_all_ranks, together
from lightning_dhellam.plan import Lane
from lightning_dhellam.plan.file import named_plan
from lightning_dhellam.recomputing import measured_bytes, when_measured
from lightning_dhellam.runner import Runner
from lightning_dhellam.search.measure import Progress, Trials
from lightning_dhellam.search.model import Costs
from lightning_dhellam.search.pipeline import links_of
from lightning_dhellam.search.report import Findings, Offer, Outcome, choose, measured


class Session:
    """A search on one rank. Every rank runs the same.

    `begin` profiles and solves, between two steps of which the first one showed a batch; `step`
    then surrounds each of the steps that follow, until `findings` are there.

    Args:
        runner: that trains.
        options: how to search.
        ending: tells whether the process is to end, which it then does before the search is over.

    Attributes:
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
        self._offers: list[Offer] = []
        self.exchange = ""
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
        measuring = Measuring(runner, self._pieces, options, self._ending, progress)
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
        limit = options.memory_limit
        if len(runner.agreed.exchanges) > 1:
            if options.profile is not None:
                raise ValueError(
                    f"profile={options.profile} is of one way of keys and values, and"
                    " context_exchange='auto' compares several: give context_exchange="
                    f"{' or '.join(map(repr, runner.agreed.exchanges))}"
                )
            with self._timed("exchange"):
                taken = measuring.exchange(slack)
            self.exchange, self._profile, limit = taken
        else:
            with self._timed("profile"):
                self._profile = measuring.profile()
        if runner.agreed.undecided:
            with self._timed("recompute"):
                self._choose_recompute(held, slack or 0.0)
            with self._timed("profile"):
                self._profile = measuring.profile()
        self._tokens = measuring.tokens
        found = self._candidates = Candidates(
            runner, options, self._profile, count=len(self._pieces), tokens=self._tokens
        )
        with self._timed("solve"):

            def solve_or_end() -> None:
                with measuring.ending_at_once():
                    found.find(limit, slack if limit is None else None)

            together(solve_or_end, runner.context.world_group)
            found.agree()
        # A file's profile was given to measure nothing.
        if options.plans and options.profile is None and runner.agreed.narrower:
            with self._timed("offers"):
                self._offers = offers(
                    runner,
                    self._pieces,
                    found,
                    (self._profile, measuring.anew),
                    tokens=self._tokens,
                    memory=Memory(limit, slack if limit is None else None),
                    ending=measuring.ending_at_once,
                )
        self._trials = Trials(self.candidates if options.plans else (), options.rounds)
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
        return tuple(self._candidates.builders)

    @property
    def left_out(self) -> dict[str, float]:
        """Plans that are not tried since they need more than the given memory limit, and bytes.

        `sequential`, to which all are compared, is always tried.
        """
        return self._candidates.left_out

    @contextmanager
    def step(self, batch: Mapping[str, Any]) -> Iterator[Callable[[], None]]:
        """Surround a training step. Gives what to call when its gradients are there."""
        walking = not self._trials.left and self._schedules is not None and self._schedules.left > 0
        if walking:
            assert self._schedules is not None
            self._schedules.follow_next()
        else:
            name = self._trials.next() if self._trials.left else self._to_trace[0]
            self._use(name)
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

    def _choose_recompute(self, held: float, slack: float) -> None:
        """Let backward make again what the memory asks for, by the times that were measured."""
        runner = self._runner
        costs = Costs.of(self._profile)
        when_measured(runner.agreed, self._pieces, runner.memory_limit, held, costs, slack)

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
            Outcome(
                name, self._candidates.step_seconds[name], self._candidates.predicted[name].exposed
            )
            for name in self._candidates.builders
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
            self._use(self._winner)
            with self._timed("schedules"):
                found = self._candidates
                builder, links = found.builders[self._winner], links_of(self._profile.transfers)
                count, tokens = len(self._pieces), self._tokens
                self._schedules.begin(
                    Costs.of(self._profile),
                    builder,
                    links,
                    busy=found.predicted[self._winner].utilisation[Lane.COMPUTE],
                    tokens=tokens,
                    count=count,
                    others=elsewhere(
                        self._runner,
                        self._profile,
                        builder,
                        links,
                        tokens=tokens,
                        micro_batches=count,
                    ),
                )

    @property
    def _reference(self) -> str:
        """What the winner is compared with: without a search it is itself."""
        return REFERENCE if self._options.plans else self._winner

    def _finish(self) -> None:
        walked = self._schedules.chosen if self._schedules is not None else None
        self._use(self._winner)
        self.findings = Findings(
            self._profile,
            self._candidates.solution,
            plan_file(
                self._runner,
                self._candidates,
                self._winner,
                self._reason,
                self._outcomes,
                walked,
            ),
            self._outcomes,
            self._winner,
            self._reason,
            self._candidates.predicted,
            {name: intervals(spans) for name, spans in self._spans.items()},
            self._seconds,
            self._reference,
            walked,
            self._offers,
        )

    def _use(self, name: str) -> None:
        self._runner.use_plan(name, self._candidates.builders[name])

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
