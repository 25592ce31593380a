"""What ranks hold alike starts alike and stays alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.gradients import GradientBuffers
from lightning_dhellam.parallel.replicas import share_buffers, start_alike
from tests.engine.harness import CPU
from tests.models.llama import SMALL
from tests.ranks import run_ranks


class Running(nn.Module):
    """A block whose parameters and buffers differ from rank to rank."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4, 3), rank + 0.5))
        self.register_buffer("mean", torch.full((3,), rank + 0.25, dtype=torch.bfloat16))
        self.register_buffer("seen", torch.tensor(rank))
        self.register_buffer("active", torch.tensor([rank % 2 == 0, True]), persistent=False)
        self.register_buffer("turned", torch.arange(6).view(2, 3).t() + rank)

    def forward(self, x: Tensor) -> Tensor:
        return x


def _state(model: CausalLM) -> dict[str, Any]:
    block = model.layers[-1]
    own = {name: value.clone() for name, value in block.named_buffers()}
    return own | {"weight": block.weight.detach().clone()}


def _on_rank(rank: int) -> dict[str, Any]:
    context = ParallelContext.create(CPU, tensor_parallel_size=2)
    model = CausalLM(SMALL, context)
    model.layers.append(Running(rank))
    split = model.layers[0].mlp.linear_fc1.weight
    with torch.no_grad():
        split.fill_(rank)
    buffers = GradientBuffers(model, model.transformer_config, context, sharded=False, fp32=True)
    start = _state(model)
    model.layers[-1].mean.fill_(rank + 1)
    model.layers[-1].seen.add_(rank + 1)
    buffers.zero()
    buffers.finish()
    return {"start": start, "step": _state(model), "split": split.mean().item()}


@pytest.fixture(scope="module")
def four_ranks() -> list[dict[str, Any]]:
    """Two data-parallel times two tensor-parallel ranks."""
    return run_ranks(4, _on_rank)


def _same(states: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    for state in states:
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            assert state[name].dtype == value.dtype and torch.equal(state[name], value), name


def test_all_start_as_the_first_rank(four_ranks: list[dict[str, Any]]) -> None:
    first = {name: value.detach() for name, value in _named(Running(0)).items()}
    _same([outcome["start"] for outcome in four_ranks], first)


def test_split_parameters_are_those_of_the_first_rank_with_the_same_part(
    four_ranks: list[dict[str, Any]],
) -> None:
    assert [outcome["split"] for outcome in four_ranks] == [0.0, 1.0, 0.0, 1.0]


def test_after_a_step_buffers_are_those_of_the_first_rank(four_ranks: list[dict[str, Any]]) -> None:
    changed = {"mean": torch.ones(3, dtype=torch.bfloat16), "seen": torch.tensor(1)}
    _same([outcome["step"] for outcome in four_ranks], _named(Running(0)) | changed)


def test_one_rank_has_nothing_to_share() -> None:
    context = ParallelContext.single(CPU)
    model = CausalLM(SMALL, context)
    model.layers.append(Running(3))
    start_alike(model, context)
    share_buffers(model, context)
    _same([_state(model)], _named(Running(3)))


def _named(block: Running) -> dict[str, Tensor]:
    return dict(block.named_buffers()) | {"weight": block.weight.detach()}
