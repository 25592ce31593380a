"""Two GPUs share each sequence by NCCL, and compute what one process does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_dhellam.engine import make_lanes
from lightning_dhellam.engine.weights import Everyone
from lightning_dhellam.kernels.deterministic import prepare
from lightning_dhellam.layers import lower
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.copy_engine import SharedMemoryTransport, open_memory
from lightning_dhellam.plan import BUILDERS, Lane
from tests.engine.harness import batch_of, differing, engine_of, pieces, prepared, train
from tests.gpu.test_several import needs
from tests.models.llama import SMALL
from tests.parallel.test_collectives import passed_on
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


def _by_both_transports(rank: int) -> list[str]:
    prepare()
    torch.use_deterministic_algorithms(True)
    device = torch.device("cuda", rank)
    context = ParallelContext.create(device, context_parallel_size=2)
    on = context.communicators[Lane.CP]
    engine = SharedMemoryTransport(open_memory(on.group, device), on.rank, on.transport)
    passed_on(replace(on, transport=engine), "cuda")
    torch.cuda.synchronize()
    model = prepared(SMALL, context, torch.bfloat16).to(device)
    batch = {name: x.to(device) for name, x in batch_of(SMALL, 4, 24).items()}
    outcomes = []
    for each in (context, context.through(Lane.CP, engine)):
        model.context = each
        lanes = make_lanes(device)
        everyone = Everyone(context.groups.cp, lanes)
        micro_batches = pieces(batch, 2, each, everyone=everyone)
        outcomes.append(train(engine_of(lower(model), device, lanes=lanes), model, micro_batches))
    return differing(*outcomes)


def test_keys_that_are_pulled_by_copy_engine_are_those_that_nccl_brings() -> None:
    needs(2)
    assert run_ranks(2, _by_both_transports, backend="nccl") == [[], []]


def test_no_plan_changes_a_bit() -> None:
    needs(2)
    for found in run_ranks(2, _with_plans, backend="nccl", timeout=240):
        assert found["wrong"] == []
        assert abs(found["ring"] - found["all_gather"]) <= 5e-3 * found["ring"]
