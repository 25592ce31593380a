"""Two GPUs share each sequence by NCCL, and compute what one process does."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_dhellam.engine import make_lanes
from lightning_dhellam.engine.weights import Everyone
from lightning_dhellam.kernels.deterministic import prepare
from lightning_dhellam.layers import lower
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.collectives import exchange
from lightning_dhellam.parallel.copy_engine import (
    PIECE,
    SharedMemoryTransport,
    open_memory,
    own_memory,
)
from lightning_dhellam.plan import BUILDERS, Lane
from tests.engine.harness import batch_of, differing, engine_of, pieces, prepared, train
from tests.gpu.test_several import needs
from tests.models.llama import SMALL
from tests.parallel.test_collectives import passed_on
from tests.plan.graphs import random_builder
from tests.ranks import run_ranks
from tests.runner.test_context_parallel import (
    Case,
    alone,
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
    found: dict[str, Any] = {"wrong": []}
    for way, packed in (("ring", False), ("all_gather", False), ("ring", True)):
        case = Case({"context_parallel_size": 2}, {"context_exchange": way}, config, packed)
        # On the host, as it comes: nothing of a document is read from the device.
        batch = case.batch
        with started(case, device, precision="bf16-mixed", plan="sequential") as runner:
            expected = runner.train(batch, step=0), gradients_of(runner)
            builders = BUILDERS | {f"random-{seed}": random_builder(seed) for seed in range(20)}
            for plan, builder in builders.items():
                runner.use_plan(plan, builder)
                outcome = runner.train(batch, step=0), gradients_of(runner)
                if differing(outcome, expected):
                    found["wrong"].append(
                        f"{way}, {packed}, {plan}: {differing(outcome, expected)}"
                    )
            found[f"{way}-packed" if packed else way] = float(expected[0])
    return found


def _by_both_transports(rank: int) -> list[str]:
    prepare()
    torch.use_deterministic_algorithms(True)
    device = torch.device("cuda", rank)
    context = ParallelContext.create(device, context_parallel_size=2)
    on = context.communicators[Lane.CP]
    engine = SharedMemoryTransport(open_memory(own_memory(device), on.group), on.rank, on.transport)
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


def _chosen(rank: int) -> dict[str, Any]:
    """What each transport trains, whether hosts wait for it, and what is found to be faster."""
    prepare()
    torch.use_deterministic_algorithms(True)
    device = torch.device("cuda", rank)
    batch = {name: x.to(device) for name, x in Case({}).batch.items()}
    found: dict[str, Any] = {"wrong": []}
    expected = None
    for name in ("nccl", "copy_engine", "auto"):
        options = {"context_transport": name, "precision": "bf16-mixed"}
        with started(Case({"context_parallel_size": 2}), device, **options) as runner:
            for seed in range(5):
                runner.use_plan(f"random-{seed}", random_builder(seed))
                outcome = runner.train(batch, step=0), gradients_of(runner)
                expected = expected or outcome
                if differing(outcome, expected):
                    found["wrong"].append(f"{name}, {seed}: {differing(outcome, expected)}")
            transport = runner.context.communicators[Lane.CP].transport
            found[name] = runner.context.carried[Lane.CP], type(transport).__name__
    # Enough for many turns of both places; then on a device that is kept busy.
    crossing = {Lane.CP: 2 * 4 * PIECE}
    context = ParallelContext.create(
        device, context_parallel_size=2, context_transport="copy_engine", crossing=crossing
    )
    on = context.communicators[Lane.CP]
    passed_on(on, "cuda")
    torch.cuda.synchronize()
    x = torch.arange(4 * PIECE // 8, device=device) + rank
    exchange(on, x[:1], target=1 - rank, source=1 - rank)  # loads the kernels
    torch.cuda.synchronize()
    torch.cuda._sleep(int(2e9))
    torch.cuda.set_sync_debug_mode("error")
    got = exchange(on, x, target=1 - rank, source=1 - rank).value
    busy = torch.cuda.Event()
    busy.record()
    found["waits"] = busy.query()
    torch.cuda.set_sync_debug_mode("default")
    found["arrived"] = bool((got == x - rank + 1 - rank).all())
    context.destroy()
    measured = ParallelContext.create(device, context_parallel_size=2, crossing=crossing)
    found["measured"] = measured.carried[Lane.CP]
    measured.destroy()
    return found


def test_the_transport_is_as_asked_or_as_is_faster() -> None:
    needs(2)
    first, second = run_ranks(2, _chosen, backend="nccl", timeout=240)
    print(first["auto"], first["measured"])
    for found in (first, second):
        assert found["wrong"] == []
        assert found["nccl"] == ("nccl", "GroupTransport")
        assert found["copy_engine"] == ("copy_engine", "SharedMemoryTransport")
        assert found["arrived"] and not found["waits"]
    times = r"an exchange of [\d.]+ MiB takes [\d.]+ ms by copy_engine and [\d.]+ ms by nccl"
    for each in (first["auto"][0], first["measured"]):
        assert re.fullmatch(f"(nccl|copy_engine): {times}", each), each
    assert (first["auto"], first["measured"]) == (second["auto"], second["measured"])


def test_no_plan_changes_a_bit() -> None:
    needs(2)
    for found in run_ranks(2, _with_plans, backend="nccl", timeout=240):
        assert found["wrong"] == []
        assert abs(found["ring"] - found["all_gather"]) <= 5e-3 * found["ring"]
        # What one process on the CPU finds, in fp32.
        expected = alone(replace(SMALL, hidden_dropout=0.1), True, exported=False)[0]
        assert abs(found["ring-packed"] - expected) <= 2e-2 * expected
