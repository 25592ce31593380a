"""What the choice of a schedule needs to know of a runner, measured between two of its steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from lightning_dhellam.autosearch.profiling import fingerprint, take_profile
from lightning_dhellam.autosearch.transfers import take_transfers
from lightning_dhellam.plan import Builder, Lane
from lightning_dhellam.plan.file import named_plan
from lightning_dhellam.runner import Runner
from lightning_dhellam.search.measure import Profile
from lightning_dhellam.search.model import Costs, simulate
from lightning_dhellam.search.pipeline import Links, links_of


@dataclass(frozen=True)
class Measured:
    """What one micro-batch of a run has shown.

    Attributes:
        profile: times of the operators of this stage, and of its transfers.
        costs: those of the profile.
        builder: of the plan that the run has.
        tokens: how many a micro-batch has.
    """

    profile: Profile
    costs: Costs
    builder: Builder
    tokens: int

    @classmethod
    def of(cls, runner: Runner, batch: Mapping[str, Any]) -> Self:
        """Measure on a batch, after a step. Every rank must call this."""
        piece = runner.intake.micro_batches(batch)[0]
        agreed = runner.agreed
        made_for = fingerprint(agreed.engine, piece, agreed.conditions, agreed.kernels.names)
        profile = take_profile(agreed.engine, piece, made_for, group=runner.context.stage_group)
        transfers = take_transfers(agreed.engine, runner.context, piece.tokens)
        profile = replace(profile, transfers=transfers)
        builder = named_plan(runner.plan, agreed.conditions)
        return cls(profile, Costs.of(profile), builder, piece.tokens)

    @property
    def links(self) -> Links:
        """The links that lead away from this stage."""
        return links_of(self.profile.transfers)

    def busy(self, runner: Runner, count: int) -> float:
        """The share of time in which compute works, in steps of `count` micro-batches."""
        step = simulate(
            runner.engine.layers,
            self.builder,
            self.costs,
            micro_batches=count,
            tokens=self.tokens,
        )
        return step.utilisation[Lane.COMPUTE]
