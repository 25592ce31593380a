"""Gradient buffers from step to step: the last step's gradients never count in the next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_dhellam.layers import lower
from lightning_dhellam.models import CausalLM, ModelConfig
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.gradients import GradientBuffers, taken_first
from lightning_dhellam.plan import BUILDERS
from tests.engine.harness import CPU, batch_of, engine_of, pieces
from tests.models.llama import SMALL


class Block(nn.Module):
    """A layer of the user's own, of which one weight is never used."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.unused = (nn.Parameter(torch.full((width,), 0.5)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


@pytest.fixture(autouse=True)
def one_rank() -> Iterator[None]:
    """Megatron's buffers need a default group, if only of this process."""
    if dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _made(config: ModelConfig, dtype: torch.dtype) -> tuple[CausalLM, GradientBuffers]:
    context = ParallelContext.single(CPU)
    model = CausalLM(config, context, dtype)
    model.layers.append(Block(config.hidden_size).to(dtype))
    buffers = GradientBuffers(model, model.transformer_config, context, sharded=False, fp32=True)
    return model, buffers


def _step(model: CausalLM, buffers: GradientBuffers, builder: str) -> dict[str, Tensor]:
    engine = engine_of(lower(model), builder=BUILDERS[builder], poison=True)
    buffers.zero()
    engine.train(pieces(batch_of(model.config, 3), 1, model.context))
    buffers.finish()
    return {name: p.main_grad.clone() for name, p in model.named_parameters()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("builder", ["sequential", "interleaved"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nothing_of_the_last_step_is_left(dtype: torch.dtype, tied: bool, builder: str) -> None:
    model, buffers = _made(replace(SMALL, tie_embeddings=tied), dtype)
    first = _step(model, buffers, builder)
    for parameter in model.parameters():
        parameter.main_grad.fill_(torch.nan)  # type: ignore[attr-defined]
    again = _step(model, buffers, builder)
    assert all(torch.equal(again[name], first[name]) for name in first)
    assert torch.all(first["layers.2.unused"] == 0)
    assert all(grad.norm() > 0 for name, grad in first.items() if "unused" not in name)
    assert not any(taken_first(parameter) for parameter in model.parameters())
