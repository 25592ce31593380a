"""However a run is laid out, its losses are those of one process under plain Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import ParallelContext
from tests.layers.test_users_blocks import Convolution, Perceptron, TokenWisePerceptron
from tests.ranks import run_ranks
from tests.strategy.runs import SHAPE, Model, join, train

Losses = dict[tuple[str, str], list[float]]


class Smoothed(Model):
    """A loss of one's own: label smoothing."""

    def compute_loss(self, logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
        return nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch["labels"].flatten(), label_smoothing=0.3
        )


class Gate(nn.Module):
    """A block of one's own: hidden states [S / TP, B, H] to the same shape."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        weight = torch.randn(SHAPE.hidden_size, SHAPE.hidden_size, generator=generator)
        self.weight = nn.Parameter(weight * 0.2)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(hidden @ self.weight)


class Gated(Model):
    """A model with a block that no lowering knows between its layers."""

    def build_model(self, context: ParallelContext, dtype: torch.dtype) -> CausalLM:
        model = super().build_model(context, dtype)
        model.layers.insert(1, Gate().to(context.device, dtype))
        return model


class Blocks(Model):
    """Blocks that mix tokens, and with Megatron's parallel linear layers inside."""

    def build_model(self, context: ParallelContext, dtype: torch.dtype) -> CausalLM:
        model = super().build_model(context, dtype)
        config, group = model.transformer_config, context.groups.tp
        with context.megatron(), torch.random.fork_rng():
            torch.manual_seed(4)
            blocks = (
                Convolution(width=SHAPE.hidden_size),
                Perceptron(config, group),
                TokenWisePerceptron(config, group),
            )
            for block in blocks:
                model.layers.insert(1, block.to(context.device, dtype))
        return model


MODULES = {"blocks": Blocks, "smoothed": Smoothed, "gated": Gated, "tied": Model, "biases": Model}
CHANGES: dict[str, dict[str, Any]] = {
    "tied": {"tie_embeddings": True},
    "biases": {
        "linear_bias": True,
        "normalization": "LayerNorm",
        "activation": "gelu",
        "position_embedding": "none",
    },
}
# What is trained, and what plain Lightning is told.
RUNS: dict[str, dict[str, Any]] = {
    "default": {},
    "clip-by-norm": {"gradient_clip_val": 0.1},
    "clip-by-value": {"gradient_clip_val": 0.003, "gradient_clip_algorithm": "value"},
    "smaller-last-batch": {"samples": 28},
    "smoothed": {},
    "gated": {},
    "blocks": {"gradient_clip_val": 0.1},
    "tied": {"gradient_clip_val": 0.1},
    "biases": {"gradient_clip_val": 0.1},
}
# How it is trained: number of processes and strategy.
ALONE: dict[str, dict[str, Any] | str] = {
    "two-samples": {"micro_batch_size": 2},
    "ragged-micro-batches": {"micro_batch_size": 3},
    "one-micro-batch": {"micro_batch_size": 8},
    "larger-than-the-batch": {"micro_batch_size": 100},
    "sequential": {"micro_batch_size": 2, "plan": "sequential"},
    "megatron": {"micro_batch_size": 2, "plan": "megatron"},
    "dhellam": {"micro_batch_size": 2, "plan": "dhellam"},
    "by-name": "dhellam",
    "sharded": {"micro_batch_size": 2, "distributed_optimizer": True},
}
PAIR: dict[str, dict[str, Any] | str] = {
    "ddp": "ddp",
    "dp2": {"micro_batch_size": 2},
    "dp2-unsharded": {"micro_batch_size": 2, "distributed_optimizer": False},
    "dp2-small-buckets": {"bucket_size": 300},
    "dp2-unsharded-small-buckets": {"bucket_size": 300, "distributed_optimizer": False},
    "tp2": {"tensor_parallel_size": 2, "micro_batch_size": 3, "recompute": "selective"},
    "tp2-kept": {"tensor_parallel_size": 2, "recompute": "none", "plan": "megatron"},
    "pp2": {"pipeline_parallel_size": 2, "micro_batch_size": 2},
    "pp2-ragged-micro-batches": {
        "pipeline_parallel_size": 2,
        "micro_batch_size": 3,
        "schedule": "zb-v",
        "recompute": {"chunk 0-1": ["full", "gathers"], "chunk 3": "none", "head": "full"},
    },
    "pp2-one-micro-batch": {
        "pipeline_parallel_size": 2,
        "micro_batch_size": 8,
        "schedule": "dualpipe-v",
    },
    "cp2": {"context_parallel_size": 2, "micro_batch_size": 3},
    "cp2-gathered": {
        "context_parallel_size": 2,
        "context_exchange": "all_gather",
        "distributed_optimizer": False,
    },
    "pp2-dhellam": {"pipeline_parallel_size": 2, "plan": "dhellam", "schedule": "1f1b"},
}
FOUR: dict[str, dict[str, Any] | str] = {
    "tp2-dp2": {"tensor_parallel_size": 2, "micro_batch_size": 2},
    "tp2-dp2-unsharded": {"tensor_parallel_size": 2, "distributed_optimizer": False},
    "pp2-tp2": {"pipeline_parallel_size": 2, "tensor_parallel_size": 2, "schedule": "dualpipe-v"},
    "pp2-dp2": {
        "pipeline_parallel_size": 2,
        "micro_batch_size": 2,
        "schedule": "interleaved-1f1b",
    },
    "tp2-cp2": {"tensor_parallel_size": 2, "context_parallel_size": 2, "micro_batch_size": 2},
    "cp2-dp2": {"context_parallel_size": 2, "micro_batch_size": 2},
    "pp2-cp2": {"pipeline_parallel_size": 2, "context_parallel_size": 2, "schedule": "zb-v"},
    "pp2-dp2-unsharded-small-buckets": {
        "pipeline_parallel_size": 2,
        "distributed_optimizer": False,
        "bucket_size": 300,
        "schedule": "zb-v",
    },
}
LAYOUTS = {1: ALONE, 2: PAIR, 4: FOUR}
# Every layout runs the default; what else could go wrong in it depends on the optimizer and
# on the groups, so one layout of each kind runs the rest.
THOROUGH = {"two-samples", "ddp", "dp2", "tp2", "tp2-dp2", "tp2-dp2-unsharded", "pp2", "pp2-dp2"}
# Blocks that mix tokens cannot be where ranks share sequences; what else such ranks share can.
OTHERS = {
    (layout, run) for layout in ("cp2", "cp2-dp2") for run in ("clip-by-norm", "smoothed", "biases")
}
CASES = [
    (world, layout, run)
    for world, layouts in LAYOUTS.items()
    for layout in layouts
    for run in RUNS
    if run == "default" or layout in THOROUGH or (layout, run) in OTHERS
]


def _train(strategy: dict[str, Any] | str, run: str) -> list[float]:
    module = MODULES.get(run, Model)(**CHANGES.get(run, {}))
    return train(strategy, module, **RUNS[run])


def _train_all(rank: int, world: int) -> Losses:
    join(rank, world)
    losses = {
        (layout, run): _train(LAYOUTS[world][layout], run)
        for size, layout, run in CASES
        if size == world
    }
    if world == 1:
        losses |= {("plain", run): _train("auto", run) for run in RUNS}
    return losses


@pytest.fixture(scope="module")
def losses() -> Losses:
    merged: Losses = {}
    for world in LAYOUTS:
        first, *others = run_ranks(world, _train_all, world)
        assert all(other == first for other in others), "ranks logged different losses"
        merged |= first
    return merged


@pytest.mark.parametrize(("world", "layout", "run"), CASES)
def test_losses_are_those_of_one_plain_process(
    losses: Losses, world: int, layout: str, run: str
) -> None:
    expected = losses["plain", run]
    assert len(set(expected)) == 4
    torch.testing.assert_close(losses[layout, run], expected, rtol=2e-6, atol=0)


def test_the_runs_that_are_compared_are_different_runs(losses: Losses) -> None:
    ends = {run: losses["plain", run][-1] for run in RUNS}
    assert len(set(ends.values())) == len(ends), ends
