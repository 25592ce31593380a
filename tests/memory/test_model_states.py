"""What is predicted of weights, gradients and state is what Megatron-core allocates."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from lightning_dhellam.memory.activations import without_memory
from lightning_dhellam.memory.model_states import ModelStates, model_states
from lightning_dhellam.models import CausalLM, ModelConfig
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.gradients import GradientBuffers
from lightning_dhellam.parallel.optimizer import ModelParallelOptimizer
from lightning_dhellam.parallel.planned import planned_context
from lightning_dhellam.plan.placement import Placement
from lightning_dhellam.precision import PRECISIONS
from tests.engine.harness import CPU
from tests.models.llama import SMALL
from tests.models.mixtures import MIXTURES
from tests.ranks import run_ranks

ODD = replace(SMALL, vocab_size=53)
"""Of a vocabulary that is padded."""


class Case(NamedTuple):
    config: ModelConfig = ODD
    precision: str = "bf16-mixed"
    sharded: bool = False
    optimizer: Any = torch.optim.AdamW
    frozen: bool = False
    tensor_parallel_size: int = 1
    bucket_size: int | None = 3000
    placement: Placement | None = None


def _held(case: Case, context: ParallelContext, *, step: bool) -> ModelStates:
    """Of a run of which one step was made, or of a planned one."""
    numbers = PRECISIONS[case.precision]
    model = CausalLM(case.config, context, numbers.dtype)
    if case.frozen:
        for layer in model.layers[:1]:
            layer.requires_grad_(False)
    buffers = GradientBuffers(
        model,
        model.transformer_config,
        context,
        sharded=case.sharded,
        fp32=numbers.fp32_gradients,
        bucket_size=case.bucket_size,
    )
    optimizer = ModelParallelOptimizer(
        case.optimizer(model.parameters(), lr=1e-3),
        buffers,
        context,
        {p: name for name, p in model.named_parameters()},
        sharded=case.sharded,
        master_weights=numbers.master_weights,
        max_skipped_steps=3,
    )
    if step:
        buffers.zero()
        buffers.ready(tuple(buffers.ddp.params_with_grad), context.megatron)
        buffers.finish()
        optimizer.step()
        assert optimizer.steps == 1
    return model_states(model, buffers, optimizer)


def _both(case: Case, context: ParallelContext) -> tuple[ModelStates, ModelStates]:
    with without_memory():
        planned = planned_context(context.topology, CPU, context.pipeline_split, context.placement)
        predicted = _held(case, planned, step=False)
    return predicted, _held(case, context, step=True)


ALONE = {
    "mixed": Case(),
    "fp32": Case(precision="32-true"),
    "bf16": Case(precision="bf16-true", optimizer=torch.optim.SGD),
    "tied-and-frozen": Case(replace(ODD, tie_embeddings=True), frozen=True),
    "rows-and-columns": Case(precision="32-true", optimizer=torch.optim.Adafactor),
    "experts": Case(MIXTURES["mixtral"]),
}


@pytest.mark.parametrize("name", ALONE)
def test_what_one_rank_holds(name: str) -> None:
    predicted, measured = _both(ALONE[name], ParallelContext.single(CPU))
    assert predicted == measured
    assert min(predicted.weights, predicted.gradients) > 0


TWO_RANKS = (
    Case(sharded=True),
    Case(sharded=True, precision="32-true", bucket_size=None),
    Case(),
    Case(MIXTURES["qwen3-moe"], sharded=True, frozen=True),
    Case(tensor_parallel_size=2),
    # The last stage has a copy of the first one's weight.
    Case(replace(ODD, tie_embeddings=True), placement=Placement.straight(2)),
)


def _on_rank(rank: int) -> list[tuple[ModelStates, ModelStates]]:
    found = []
    for case in TWO_RANKS:
        context = ParallelContext.create(
            CPU,
            tensor_parallel_size=case.tensor_parallel_size,
            pipeline_parallel_size=case.placement.stages if case.placement else 1,
            placement=case.placement,
        )
        found.append(_both(case, context))
        context.destroy(keep=True)
    return found


def test_what_two_ranks_hold() -> None:
    for found in run_ranks(2, _on_rank):
        assert [predicted for predicted, _ in found] == [measured for _, measured in found]
        sharded, _, whole, *_ = (predicted for predicted, _ in found)
        assert sharded.optimizer < 0.6 * whole.optimizer
