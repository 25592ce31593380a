"""No plan, and no poison, changes one bit of the loss or of a gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_dhellam.engine import Engine
from lightning_dhellam.layers import lower
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.collectives import same_on_all_ranks
from lightning_dhellam.plan import BUILDERS
from lightning_dhellam.plan.passes import CHOICES
from tests.engine.harness import CPU, add_main_grads, batch_of, differing, engine_of, pieces, train
from tests.models.llama import SMALL
from tests.plan.graphs import random_builder
from tests.ranks import run_ranks

CONFIG = replace(SMALL, num_layers=2, hidden_dropout=0.1, tie_embeddings=True, vocab_size=53)
RANDOM_PLANS = 200
CHOSEN = {"0": "selective", "1": "full", "head": "gathers"}


def _steps_that_differ(context: ParallelContext, dtype: torch.dtype, plans: int) -> list[str]:
    """Plans whose outcome is not bitwise that of the sequential plan."""
    model = CausalLM(CONFIG, context, dtype)
    add_main_grads(model)
    lowered = lower(model, recompute=CHOSEN)
    micro_batches = pieces(batch_of(CONFIG, samples=3, length=8), 2, context)
    plain = engine_of(lowered, builder=BUILDERS["sequential"])
    expected = train(plain, model, micro_batches)
    assert all(gradient.norm() > 0 for gradient in expected[1].values())
    builders = BUILDERS | {f"random-{seed}": random_builder(seed) for seed in range(plans)}
    wrong, digests = [], set()
    poisoned = engine_of(lowered, poison=True)
    for index, (name, builder) in enumerate(builders.items()):
        engine = poisoned if index % 2 else plain
        engine.install(builder)
        differences = differing(train(engine, model, micro_batches), expected)
        if differences:
            wrong.append(f"{name}: {differences}")
        digest = "".join(plan.digest for plan in engine.plans())
        digests.add(digest)
        if index < 8:
            assert same_on_all_ranks(digest, context.groups.tp) == []
    assert len(digests) == len(builders)
    return wrong


@pytest.mark.parametrize(
    ("dtype", "plans"),
    [(torch.float32, RANDOM_PLANS), (torch.bfloat16, 20)],
    ids=["fp32", "bf16"],
)
def test_one_rank(dtype: torch.dtype, plans: int) -> None:
    assert _steps_that_differ(ParallelContext.single(CPU), dtype, plans) == []


def _on_rank(rank: int) -> tuple[list[str], list[str], list[str]]:
    context = ParallelContext.create(CPU, tensor_parallel_size=2)
    wrong = _steps_that_differ(context, torch.float32, RANDOM_PLANS)
    wrong_in_bf16 = _steps_that_differ(context, torch.bfloat16, 20)
    return wrong, wrong_in_bf16, same_on_all_ranks(f"plan of rank {rank}", context.groups.tp)


def test_two_tensor_ranks_and_the_check_that_their_plans_agree() -> None:
    for wrong, wrong_in_bf16, plans in run_ranks(2, _on_rank, timeout=600):
        assert wrong == [] and wrong_in_bf16 == []
        assert plans == ["plan of rank 0", "plan of rank 1"]


@pytest.mark.parametrize("poison", [False, True])
@pytest.mark.parametrize("name", BUILDERS)
def test_counters_alone_determine_the_random_numbers(name: str, poison: bool) -> None:
    context = ParallelContext.single(CPU)
    model = CausalLM(CONFIG, context)
    add_main_grads(model)
    lowered = lower(model)

    def outcome(engine: Engine, step: int, seed: int) -> tuple[torch.Tensor, dict]:
        torch.manual_seed(seed)
        return train(engine, model, pieces(batch_of(CONFIG), 2, context, step))

    engine = engine_of(lowered, builder=BUILDERS[name], poison=poison)
    first = outcome(engine, step=3, seed=0)
    other = outcome(engine, step=4, seed=0)
    assert "loss" in differing(other, first)
    assert differing(outcome(engine, step=3, seed=99), first) == []
    assert differing(outcome(engine_of(lowered), step=3, seed=5), first) == []


def _experts_on_rank(rank: int) -> tuple[list[str], list[str]]:
    context = ParallelContext.create(CPU, expert_parallel_size=2)
    config = replace(
        CONFIG,
        num_experts=4,
        expert_ffn_hidden_size=24,
        moe_layer_freq=(1, 0),
        shared_expert_ffn_hidden_size=16,
        aux_loss_coefficient=0.1,
        capacity_factor=1.1,
    )
    model = CausalLM(config, context)
    add_main_grads(model)
    choices = (*CHOICES, {"0": "full", "1": ["gathers", "act"]})
    lowered = [lower(model, recompute=choice) for choice in choices]
    # Each rank has samples of its own, so experts get other numbers of rows from each.
    batch = {name: value.roll(rank) for name, value in batch_of(config, 3, 8).items()}
    expected = None
    wrong: list[str] = []
    for seed in range(-8, 40):
        builder = random_builder(seed) if seed >= 0 else BUILDERS["sequential"]
        engine = engine_of(lowered[seed // 2 % len(lowered)], builder=builder, poison=seed % 2 == 0)
        outcome = train(engine, model, pieces(batch, 1, context))
        expected = expected or outcome
        wrong += [f"random-{seed}: {name}" for name in differing(outcome, expected)]
    assert expected is not None
    idle = [name for name, gradient in expected[1].items() if not gradient.norm() > 0]
    return wrong, idle


def test_two_expert_ranks() -> None:
    for wrong, idle in run_ranks(2, _experts_on_rank):
        assert wrong == [] and idle == []
