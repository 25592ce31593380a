"""Norms of queries and keys, of each head or of all together, lowered, against autograd."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_dhellam.layers import lower
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.plan import BUILDERS
from tests.engine.harness import CPU, batch_of, differing, engine_of, pieces, reduced, train
from tests.layers.test_bias import TOLERANCE, by_autograd, filled, freeze
from tests.models.llama import SMALL, relative_error
from tests.plan.graphs import random_builder
from tests.ranks import run_ranks

NORMED = replace(SMALL, vocab_size=53, qk_norm=True, head_dim=10)
CONFIGS = {
    "rotary": NORMED,
    "layer norm": replace(NORMED, normalization="LayerNorm"),
    "a head for each group, no rotary": replace(
        NORMED, num_query_groups=4, position_embedding="none"
    ),
    "of all heads": replace(NORMED, qk_norm_whole=True),
    "of all heads and after the blocks": replace(
        NORMED, qk_norm_whole=True, post_norm=True, position_embedding="none"
    ),
}
NORMS = ("q_layernorm.weight", "k_layernorm.weight")


def _errors(config: str, frozen: str, context: ParallelContext) -> dict[str, float]:
    model = filled(CONFIGS[config], context)
    freeze(model, [frozen])
    batch = batch_of(CONFIGS[config], 3, 16)
    loss, gradients = train(engine_of(lower(model), poison=True), model, pieces(batch, 3, context))
    gradients = reduced(model, gradients)
    expected_loss, expected = by_autograd(model, batch, context)
    assert gradients.keys() == expected.keys()
    errors = {name: relative_error(gradients[name], value) for name, value in expected.items()}
    return {**errors, "loss": (loss - expected_loss).abs().item() / expected_loss.item()}


def _check(errors: dict[str, float]) -> None:
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("frozen", ["nothing", "q_layernorm.weight"])
def test_against_autograd(config: str, frozen: str) -> None:
    errors = _errors(config, frozen, ParallelContext.single(CPU))
    norms = [name for name in errors if name.endswith(NORMS)]
    assert len(norms) == SMALL.num_layers * (2 if frozen == "nothing" else 1)
    _check(errors)


def _on_rank(rank: int) -> list[dict[str, float]]:
    context = ParallelContext.create(CPU, tensor_parallel_size=2)
    return [_errors(config, "nothing", context) for config in CONFIGS]


def test_tensor_parallel_ranks_add_up_what_their_heads_give() -> None:
    for found in run_ranks(2, _on_rank):
        for errors in found:
            _check(errors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("config", ["rotary", "of all heads and after the blocks"])
def test_no_plan_changes_it(config: str, dtype: torch.dtype) -> None:
    context = ParallelContext.single(CPU)
    model = filled(CONFIGS[config], context, dtype)
    lowered, batch = lower(model), pieces(batch_of(NORMED, 4, 16), 2, context)
    expected = train(engine_of(lowered, builder=BUILDERS["sequential"]), model, batch)
    for builder in (*BUILDERS.values(), *map(random_builder, range(3))):
        engine = engine_of(lowered, builder=builder, poison=True)
        assert differing(train(engine, model, batch), expected) == []


def test_slots_are_those_that_backward_needs() -> None:
    def saved(**changes: Any) -> set[str]:
        config = replace(NORMED, **changes)
        return set(lower(CausalLM(config, ParallelContext.single(CPU))).layers[1].saved)

    assert saved() >= {"qkv", "rotated", "query_rstd", "key_rstd"}
    assert "heads" not in saved()
    assert "heads" in saved(position_embedding="none")
    assert "qkv" not in saved(qk_norm=False)
