"""Two GPUs share each sequence by NCCL, and compute what one process does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_dhellam.kernels.deterministic import prepare
from lightning_dhellam.plan import BUILDERS
from tests.engine.harness import differing
from tests.gpu.test_several import needs
from tests.models.llama import SMALL
from tests.plan.graphs import random_builder
from tests.ranks import run_ranks
from tests.runner.test_context_parallel import (
    Case,
    batch_with_mask,
    check_outcomes,
    gradients_of,
    outcomes_of_rank,
    started,
)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("world", [2, 4])
def test_loss_gradients_and_logits_are_hugging_faces(world: int) -> None:
    needs(world)
    check_outcomes(world, run_ranks(world, outcomes_of_rank, world, "gpu", backend="nccl"))


def _with_plans(rank: int) -> dict[str, Any]:
    prepare()
    torch.use_deterministic_algorithms(True)
    device = torch.device("cuda", rank)
    config = replace(SMALL, hidden_dropout=0.1)
    batch = {name: x.to(device) for name, x in batch_with_mask(config).items()}
    found: dict[str, Any] = {"wrong": []}
    for way in ("ring", "all_gather"):
        case = Case({"context_parallel_size": 2}, {"context_exchange": way}, config)
        with started(case, device, precision="bf16-mixed", plan="sequential") as runner:
            expected = runner.train(batch, step=0), gradients_of(runner)
            builders = BUILDERS | {f"random-{seed}": random_builder(seed) for seed in range(20)}
            for plan, builder in builders.items():
                runner.use_plan(plan, builder)
                outcome = runner.train(batch, step=0), gradients_of(runner)
                if differing(outcome, expected):
                    found["wrong"].append(f"{way}, {plan}: {differing(outcome, expected)}")
            found[way] = float(expected[0])
    return found


def test_no_plan_changes_a_bit() -> None:
    needs(2)
    for found in run_ranks(2, _with_plans, backend="nccl", timeout=240):
        assert found["wrong"] == []
        assert abs(found["ring"] - found["all_gather"]) <= 5e-3 * found["ring"]
