"""What the choice of a plan or a schedule needs to know of a runner, measured between two steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from lightning_dhellam.autosearch.profiling import fingerprint, routings_of, take_profile
from lightning_dhellam.autosearch.reductions import Reduction
from lightning_dhellam.autosearch.transfers import take_transfers
from lightning_dhellam.plan import Builder, Lane
from lightning_dhellam.plan.file import named_plan
from lightning_dhellam.runner import Runner
from lightning_dhellam.search.measure import Profile
from lightning_dhellam.search.model import Costs, Reductions, Simulation, simulate
from lightning_dhellam.search.pipeline import Links, links_of


@dataclass(frozen=True)
class Measured:
    """What one micro-batch of a run has shown.

    Attributes:
        profile: times of the operators of this stage, and of its transfers.
        costs: those of the profile.
        builder: of the plan that the run has.
        tokens: how many a micro-batch has.
        reductions: what data-parallel ranks reduce in a step; None in a pipeline, of which that is
            not predicted.
    """

    profile: Profile
    costs: Costs
    builder: Builder
    tokens: int
    reductions: Reductions | None = None

    @classmethod
    def of(cls, runner: Runner, batch: Mapping[str, Any], repeats: int = 7) -> Self:
        """Measure on a batch, after a step. Every rank must call this."""
        return cls.by(profile_of(runner, batch, repeats), runner, batch)

    @classmethod
    def by(cls, profile: Profile, runner: Runner, batch: Mapping[str, Any]) -> Self:
        """What a profile says, which was taken on such a batch."""
        piece = runner.intake.micro_batches(batch)[0]
        builder = named_plan(runner.plan, runner.agreed.conditions)
        reduction = _reduction(runner)
        reductions = reduction and reduction.of_step(runner.engine, profile)
        return cls(profile, Costs.of(profile), builder, piece.tokens, reductions)

    @property
    def links(self) -> Links:
        """The links that lead away from this stage."""
        return links_of(self.profile.transfers)

    def busy(self, runner: Runner, count: int, builder: Builder | None = None) -> float:
        """The share of time in which compute works, in steps of `count` micro-batches."""
        return self.step(runner, count, builder).utilisation[Lane.COMPUTE]

    def step(self, runner: Runner, count: int, builder: Builder | None = None) -> Simulation:
        """Steps of `count` micro-batches through this stage's layers, as the simulator has them.

        By the plans of `builder`; None for those of the run.
        """
        return simulate(
            runner.engine.layers,
            builder or self.builder,
            self.costs,
            micro_batches=count,
            tokens=self.tokens,
            reductions=self.reductions,
        )


def profile_of(runner: Runner, batch: Mapping[str, Any], repeats: int = 7) -> Profile:
    """Measure the operators of this stage, and its transfers, on a batch, after a step.

    Every rank must call this.
    """
    pieces, agreed = runner.intake.micro_batches(batch), runner.agreed
    profile = take_profile(
        agreed.engine,
        pieces[0],
        fingerprint(agreed.engine, pieces[0], agreed.conditions, agreed.kernels.names),
        group=runner.context.stage_group,
        repeats=repeats,
        reduction=_reduction(runner),
        others=routings_of(agreed.engine, pieces, runner.context.world_group),
    )
    transfers = take_transfers(agreed.engine, runner.context, pieces[0].tokens)
    return replace(profile, transfers=transfers)


def _reduction(runner: Runner) -> Reduction | None:
    single = runner.context.topology.pp_size == 1
    return Reduction.of(runner.gradient_buffers) if single else None
