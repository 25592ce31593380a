"""A block of the user's own that starts otherwise on each rank, and whose buffers change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import ParallelContext
from tests.ranks import run_ranks
from tests.strategy.runs import SHAPE, Losses, Model, join, loader, make_trainer

STEPS, STOP = 4, 2


class Centred(nn.Module):
    """Subtracts a running mean of what this rank has seen; its weight is drawn on each rank."""

    def __init__(self) -> None:
        super().__init__()
        width = SHAPE.hidden_size
        self.weight = nn.Parameter(torch.randn(width, width) * 0.2)
        self.register_buffer("mean", torch.randn(width))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        y = x + torch.tanh((x - self.mean.to(x.dtype)) @ self.weight)
        if self.training:
            self.mean.lerp_(x.detach().float().mean((0, 1)), 0.1)
            self.steps += 1
        return y


class TokenWise(Centred):
    """So that tensor-parallel ranks see other tokens too."""

    token_wise = True


class WithBlock(Model):
    """Each rank draws its block from a seed of its own."""

    def __init__(self, block: type[Centred]) -> None:
        super().__init__()
        self.block = block

    def build_model(self, context: ParallelContext, dtype: torch.dtype) -> CausalLM:
        model = super().build_model(context, dtype)
        with torch.random.fork_rng():
            torch.manual_seed(dist.get_rank())
            model.layers.insert(1, self.block().to(context.device, dtype))
        return model


Outcome = tuple[list[float], dict[str, Tensor]]


def _fit(
    strategy: dict[str, Any], block: type[Centred], steps: int, *callbacks: Any, **resume: Any
) -> Outcome:
    losses, module = Losses(), WithBlock(block)
    trainer = make_trainer(
        strategy, [losses, *callbacks], max_steps=steps, enable_checkpointing=bool(callbacks)
    )
    trainer.fit(module, loader(strategy, samples=64), **resume)
    state = {name: value.clone() for name, value in module.model.layers[1].state_dict().items()}
    return losses.values, state


def _on_rank(rank: int, root: Path) -> dict[str, dict[str, Outcome]]:
    join(rank, 4)
    strategy = {"tensor_parallel_size": 2, "micro_batch_size": 2}
    outcomes = {}
    for block in (Centred, TokenWise):
        folder = root / block.__name__
        keep = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=STOP, save_top_k=-1)
        outcomes[block.__name__] = {
            "straight": _fit(strategy, block, STEPS),
            "before": _fit(strategy, block, STOP, keep),
            "after": _fit(strategy, block, STEPS, ckpt_path=folder / f"step={STOP}.ckpt"),
        }
    return outcomes


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Outcome]]]:
    return run_ranks(4, _on_rank, tmp_path_factory.mktemp("blocks"), timeout=600)


@pytest.mark.parametrize("block", ["Centred", "TokenWise"])
def test_all_ranks_have_one_block(
    block: str, four_ranks: list[dict[str, dict[str, Outcome]]]
) -> None:
    for run in ("straight", "before", "after"):
        first, *others = (outcome[block][run] for outcome in four_ranks)
        for losses, state in others:
            assert losses == first[0]
            for name, value in first[1].items():
                assert torch.equal(state[name], value), f"{run}: {name}"


@pytest.mark.parametrize("block", ["Centred", "TokenWise"])
def test_a_run_that_goes_on_is_the_run_that_was_never_ended(
    block: str, four_ranks: list[dict[str, dict[str, Outcome]]]
) -> None:
    for outcome in four_ranks:
        straight, before, after = (outcome[block][run] for run in ("straight", "before", "after"))
        assert before[0] + after[0] == straight[0]
        assert before[1]["steps"] == STOP * 2 and straight[1]["steps"] == STEPS * 2
        for name, value in straight[1].items():
            assert torch.equal(after[1][name], value), name
