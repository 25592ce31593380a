"""Mixtures of experts on GPUs, alone and with experts on two, whose rows NCCL exchanges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_dhellam.kernels.deterministic import prepare
from lightning_dhellam.plan import BUILDERS
from tests.engine.harness import batch_of, differing
from tests.gpu.test_several import needs
from tests.models.mixtures import MIXTURES
from tests.plan.graphs import random_builder
from tests.ranks import run_ranks
from tests.runner.test_expert_parallel import (
    Case,
    Outcome,
    check_outcomes,
    gradients_of,
    outcomes_of_rank,
    started,
)

pytestmark = pytest.mark.gpu
RANDOM_PLANS = 10
LENGTHS = (16, 9, 24)
"""Tokens of each step's sequences: what ranks exchange is of other sizes in each."""


def _true_fp32() -> None:
    prepare()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True)


def _outcomes(rank: int, world: int) -> dict[str, Outcome]:
    _true_fp32()
    return outcomes_of_rank(rank, world, "cuda")


@pytest.mark.parametrize("world", [1, 2, 4])
def test_loss_gradients_and_logits_are_hugging_faces(world: int) -> None:
    needs(world)
    check_outcomes(world, run_ranks(world, _outcomes, world, backend="nccl", timeout=240))


def _with_plans(rank: int, world: int, kind: str = "cuda") -> list[str]:
    _true_fp32()
    config = replace(MIXTURES["mixtral"], head_dim=16)  # which every attention kernel takes
    device = torch.device("cuda", rank) if kind == "cuda" else torch.device(kind)
    batches = [
        {name: x.to(device) for name, x in batch_of(config, 4, length).items()}
        for length in LENGTHS
    ]
    case = Case({"expert_parallel_size": world})
    wrong = []
    with started(case, device, config=config, precision="bf16-mixed", plan="sequential") as runner:
        expected = [(runner.train(batch, step=0), gradients_of(runner)) for batch in batches]
        builders = BUILDERS | {f"random-{s}": random_builder(s) for s in range(RANDOM_PLANS)}
        for plan, builder in builders.items():
            runner.use_plan(plan, builder)
            for length, batch, wanted in zip(LENGTHS, batches, expected, strict=True):
                found = runner.train(batch, step=0), gradients_of(runner)
                if differing(found, wanted):
                    wrong.append(f"{plan}, {length} tokens: {differing(found, wanted)}")
    return wrong


@pytest.mark.parametrize("world", [1, 2])
def test_no_plan_changes_a_bit_whatever_the_sizes(world: int) -> None:
    needs(world)
    found = run_ranks(world, _with_plans, world, backend="nccl", timeout=240)
    assert found == [[]] * world
