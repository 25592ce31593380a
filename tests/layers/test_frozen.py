"""Frozen parameters have no gradient, and change none of the others."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_dhellam.layers import Lowered, lower
from lightning_dhellam.models import CausalLM, ModelConfig
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.plan import BUILDERS
from tests.engine.harness import (
    CPU,
    add_main_grads,
    batch_of,
    differing,
    engine_of,
    pieces,
    train,
)
from tests.models.llama import SMALL
from tests.ranks import run_ranks

LLAMA = replace(SMALL, vocab_size=53, hidden_dropout=0.1)
CONFIGS = {
    "llama": LLAMA,
    "tied": replace(LLAMA, tie_embeddings=True),
    "gpt": replace(LLAMA, normalization="LayerNorm", activation="gelu"),
    # Megatron-core's autograd gives the bias of a frozen query-key-value weight no gradient.
    "biases": replace(LLAMA, linear_bias=True, position_embedding="none"),
}
KINDS = [
    "embedding",
    "input_layernorm",
    "linear_qkv",
    "linear_proj",
    "pre_mlp_layernorm",
    "linear_fc1",
    "linear_fc2",
    "final_norm",
    "output_layer",
    ".bias",
    ".weight",
    "layers",
]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _check(config: ModelConfig, kind: str, dtype: torch.dtype, context: ParallelContext) -> None:
    """Freeze every parameter with `kind` in its name."""
    model = CausalLM(config, context, dtype)
    add_main_grads(model)
    micro_batches = pieces(batch_of(config, 3, 8), 1, context)
    loss, free = train(engine_of(lower(model), poison=True), model, micro_batches)
    frozen = {name for name in free if kind in name}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    add_main_grads(model)
    lowered = lower(model)
    outcome = train(engine_of(lowered, poison=True), model, micro_batches)
    expected = {name: gradient for name, gradient in free.items() if name not in frozen}
    assert differing(outcome, (loss, expected)) == []
    assert _accumulated(lowered) == {id(p) for p in model.parameters() if p.requires_grad}


def _accumulated(lowered: Lowered) -> set[int]:
    graphs = [pair.backward for pair in lowered.layers]
    return {id(p) for graph in graphs for o in graph.operators for p in o.accumulates}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", CONFIGS)
def test_other_gradients_stay_what_they_are(config: str, kind: str, dtype: str) -> None:
    _check(CONFIGS[config], kind, DTYPES[dtype], ParallelContext.single(CPU))


def _on_rank(rank: int) -> list[str]:
    context = ParallelContext.create(CPU, tensor_parallel_size=2)
    for config in (LLAMA, CONFIGS["biases"]):
        for kind in KINDS:
            for dtype in DTYPES.values():
                _check(config, kind, dtype, context)
    model = CausalLM(LLAMA, context, torch.bfloat16)
    model.requires_grad_(False)
    lowered = lower(model)
    for builder in BUILDERS.values():
        engine_of(lowered, builder=builder).plans()
    return [o.name for pair in lowered.layers for o in pair.backward.operators]


def test_on_two_tensor_ranks_what_only_frozen_weights_would_read_is_not_gathered_again() -> None:
    for names in run_ranks(2, _on_rank):
        assert "fc1.grad_scatter" in names
        assert not [name for name in names if name.endswith(".again") or "wgrad" in name]
