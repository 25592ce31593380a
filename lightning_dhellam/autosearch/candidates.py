"""The plans that a search tries, and what each is predicted to take."""

from __future__ import annotations

import torch

from lightning_dhellam.autosearch.options import Options
from lightning_dhellam.autosearch.reductions import Reduction
from lightning_dhellam.parallel.collectives import largest, of_all_ranks
from lightning_dhellam.plan import BUILDERS, Builder, Lane
from lightning_dhellam.plan.file import named_plan
from lightning_dhellam.runner import Runner
from lightning_dhellam.search.measure import Profile
from lightning_dhellam.search.model import Costs, Reductions, Simulation, simulate
from lightning_dhellam.search.pipeline import PipelineStep, VisitTable, links_of
from lightning_dhellam.search.solve import ModelSolution, peak_bytes, solve

REFERENCE = "sequential"
"""What all plans are compared with."""


class Candidates:
    """Finds plans for the layers of a rank. Every rank does the same.

    Args:
        runner: that trains.
        options: how to search.
        profile: of the operators.
        count: micro-batches of a step.
        tokens: of a micro-batch.

    Attributes:
        solution: the searched plan.
        builders: what makes each plan, by its name.
        predicted: a step on this rank alone, by the plan's name.
        step_seconds: what a step of all ranks takes, by the plan's name.
        left_out: plans that are not tried since they need more than the given memory limit, and
            the bytes that they need.
    """

    solution: ModelSolution
    builders: dict[str, Builder]
    predicted: dict[str, Simulation]
    step_seconds: dict[str, float]

    def __init__(
        self, runner: Runner, options: Options, profile: Profile, *, count: int, tokens: int
    ) -> None:
        stage = runner.engine.stage
        self._runner = runner
        self._options = options
        self._profile = profile
        self._count = count
        self._tokens = tokens
        self._stage = PipelineStep(stage.number, stage.count, count, stage.scheme)
        self.left_out: dict[str, float] = {}

    def find(self, limit: float | None, slack: float | None) -> None:
        """Solve on this rank, for a limit or a slack of memory in bytes, and predict all plans.

        Raises:
            ValueError: no order keeps the memory limit.
        """
        layers = self._runner.engine.layers
        costs = Costs.of(self._profile)
        tokens = self._tokens
        # Stages try the same plans, also one that has no GEMM to spare.
        some = torch.tensor([float(bool(costs.sparable))])
        spares = bool(largest(some, self._runner.context.world_group))
        self.solution = solve(layers, costs, tokens=tokens, memory_limit=limit, memory_slack=slack)
        published = solve(layers, costs, algorithm="pairs", tokens=tokens)
        self.builders = {
            **BUILDERS,
            "pairs": published.builder(),
            "auto": self.solution.builder(),
        }
        if spares:
            # The other end of what `auto` chooses from, should it choose wrongly.
            everywhere = costs.sparing(costs.sparable)
            spare = solve(layers, everywhere, tokens=tokens, memory_limit=limit, memory_slack=slack)
            self.builders["spare"] = spare.builder()
        given = self._runner.plan
        if given not in self.builders:
            self.builders[given] = named_plan(given, self._runner.agreed.conditions)
        if not self._options.plans:
            self.builders = {given: self.builders[given]}
        given_limit = self._options.memory_limit
        if given_limit is not None:
            needs = {
                name: peak_bytes(layers, builder, costs, tokens=tokens)
                for name, builder in self.builders.items()
                if name != REFERENCE
            }
            self.left_out = {name: peak for name, peak in needs.items() if peak > given_limit}
        reductions = self._reductions()
        self.predicted = {
            name: simulate(
                layers,
                builder,
                costs,
                micro_batches=self._count,
                tokens=tokens,
                reductions=reductions,
            )
            for name, builder in self.builders.items()
        }
        self._visits = (
            {name: self._costs_of(name, costs, tokens) for name in self.builders}
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
            self.builders[name],
            costs,
            busy=self.predicted[name].utilisation[Lane.COMPUTE],
            tokens=tokens,
        )

    def agree(self) -> None:
        """Take what all stages have found together. Every rank must call this.

        What one leaves out, none tries, and a step takes as long as all of them together.
        """
        self.step_seconds = {name: step.seconds for name, step in self.predicted.items()}
        if self._runner.context.topology.pp_size > 1:
            links = links_of(self._profile.transfers)
            known = of_all_ranks(
                (self.left_out, self._visits, links), self._runner.context.groups.pp
            )
            every = {edge: link for *_, own in known for edge, link in own.items()}
            for name in self.builders:
                peaks = [left_out[name] for left_out, *_ in known if name in left_out]
                if peaks:
                    self.left_out[name] = max(peaks)
                visits = [row[1][name] for row in known]
                self.step_seconds[name] = self._stage.seconds(visits, every)
        for name in self.left_out:
            del self.builders[name], self.predicted[name]
