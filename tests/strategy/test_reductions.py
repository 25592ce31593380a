"""The reduction of gradients is profiled beside communication of layers, and is part of a step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_dhellam.autosearch.profiling import fingerprint, take_profile
from lightning_dhellam.autosearch.reductions import Reduction
from lightning_dhellam.plan import BUILDERS, Collective, Lane
from lightning_dhellam.runner import Runner
from lightning_dhellam.search.measure import Profile
from lightning_dhellam.search.model import Costs, Reductions, Simulation, simulate
from tests.ranks import run_ranks
from tests.strategy.runs import SHAPE, join

KEY = "gradients/reduce"


def _profiled(
    rank: int, tensor_parallel_size: int, world: int, optimizer: str
) -> tuple[Profile, Collective | None, Reductions, float, Simulation, bool]:
    """A profile, what a step reduces, all bytes of gradients, a step, and whether those stay."""
    join(rank, world)
    options: dict[str, Any] = {"tensor_parallel_size": tensor_parallel_size, "bucket_size": 1000}
    with Runner.create(replace(SHAPE, num_layers=1), micro_batch_size=2, **options) as runner:
        kind = getattr(torch.optim, optimizer)
        runner.optimizer(kind(runner.model.parameters(), lr=0.1))
        tokens = torch.arange(2 * 12).view(2, 12) % SHAPE.vocab_size
        batch = {"tokens": tokens, "labels": tokens}
        runner.train(batch)
        buffers = runner.gradient_buffers
        reduction = Reduction.of(buffers)
        assert reduction is not None
        piece, agreed = runner.intake.micro_batches(batch)[0], runner.agreed
        made_for = fingerprint(agreed.engine, piece, agreed.conditions, agreed.kernels.names)
        before = buffers.largest_bucket.clone()
        with torch.no_grad():
            pending = buffers.reduce(torch.zeros_like(before))
        if pending.work is not None:
            pending.work.wait()
        unharmed = torch.equal(before, buffers.largest_bucket)
        profile = take_profile(
            runner.engine,
            piece,
            made_for,
            group=runner.context.stage_group,
            repeats=1,
            rounds=1,
            reduction=reduction,
        )
        reductions = reduction.of_step(runner.engine, profile)
        assert reductions is not None
        assert reduction.of_step(runner.engine, Profile(made_for, {}, {}, ())) is None
        step = simulate(
            runner.engine.layers,
            BUILDERS["interleaved"],
            Costs.of(profile),
            micro_batches=2,
            reductions=reductions,
        )
        total = sum(p.main_grad.nbytes for p in runner.model.parameters())
        (graph,) = (graph for graph in profile.graphs if graph.name == "gradients")
        collective = graph.operators[0].collective
        bare = replace(profile, graphs=())
        return bare, collective, reductions, float(total), step, unharmed


@pytest.mark.parametrize(
    ("tensor_parallel_size", "world", "optimizer", "collective"),
    [(2, 4, "AdamW", Collective.REDUCE_SCATTER), (1, 2, "SGD", Collective.ALL_REDUCE)],
)
def test_reductions_are_profiled_and_played(
    tensor_parallel_size: int, world: int, optimizer: str, collective: Collective
) -> None:
    for profile, kind, reductions, total, step, unharmed in run_ranks(
        world, _profiled, tensor_parallel_size, world, optimizer
    ):
        assert unharmed and kind is collective
        assert profile.lanes[KEY] is Lane.DP
        partners = {row.partner for row in profile.timings if row.operator == KEY}
        lanes = {profile.lanes[key] for key in partners if key is not None}
        expected = {Lane.COMPUTE, Lane.TP} if tensor_parallel_size > 1 else {Lane.COMPUTE}
        assert lanes == expected
        for key in partners - {None}:
            assert any(row.operator == key and row.partner == KEY for row in profile.timings)
        assert sum(reductions.gradients) == total
        assert 4000 <= reductions.bucket < total
        assert step.busy[Lane.DP] > 0
