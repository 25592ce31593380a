"""Loss and every gradient of a training step against transformers' Llama, fp32, all layouts."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_dhellam.data.loader import ResumableDataLoader, SampleOrder
from lightning_dhellam.models import CausalLM, ModelConfig, export_llama, import_llama
from lightning_dhellam.module import DualStrandMixin
from lightning_dhellam.parallel import ParallelContext
from tests.models.llama import (
    SMALL,
    hugging_face_llama,
    random_batch,
    relative_error,
    token_losses,
)
from tests.ranks import run_ranks
from tests.strategy.runs import Losses, join, make_trainer

SAMPLES, LENGTH = 6, 16
CONFIGS = {
    "untied-odd-vocabulary": replace(SMALL, vocab_size=53),
    "tied-one-group-per-head": replace(SMALL, num_query_groups=4, tie_embeddings=True),
    "tiny-vocabulary-tied": replace(SMALL, vocab_size=7, tie_embeddings=True),
}
# Processes and strategy; the micro-batches are ragged in all of them.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "alone": (1, {"micro_batch_size": 4}),
    "tp2": (2, {"tensor_parallel_size": 2, "micro_batch_size": 4}),
    "tp2-kept": (2, {"tensor_parallel_size": 2, "micro_batch_size": 1, "recompute": "none"}),
    "dp2": (2, {"micro_batch_size": 2, "distributed_optimizer": False}),
    "dp2-buckets": (2, {"bucket_size": 2000, "distributed_optimizer": False}),
    "tp2-dp2": (
        4,
        {"tensor_parallel_size": 2, "micro_batch_size": 2, "distributed_optimizer": False},
    ),
    "dp2-sharded": (2, {"micro_batch_size": 2}),
    "tp2-dp2-sharded": (4, {"tensor_parallel_size": 2, "micro_batch_size": 2}),
}
Outcome = tuple[float, dict[str, Tensor], dict[str, Tensor]]


class Batch(Dataset[dict[str, Tensor]]):
    """One global batch, some of whose labels do not count."""

    def __init__(self, config: ModelConfig) -> None:
        self.tokens, self.labels = random_batch(config, SAMPLES, LENGTH)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"tokens": self.tokens[index], "labels": self.labels[index]}


class Imported(DualStrandMixin):
    """Hugging Face's weights, and an AdamW whose first step is plain gradient descent.

    An enormous epsilon beside an equal learning rate leaves `weight - gradient`, up to 1e-9.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model_config = config

    def build_model(self, context: ParallelContext, dtype: torch.dtype) -> CausalLM:
        model = super().build_model(context, dtype)
        import_llama(model, hugging_face_llama(self.model_config))
        return model

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e9, eps=1e9, weight_decay=0.0)


class Gradients(Callback):
    """The `main_grad` of every parameter, which is gone when the run is over."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DualStrandMixin)
        parameters: dict[str, Any] = dict(pl_module.model.named_parameters())
        self.values = {name: p.main_grad.clone() for name, p in parameters.items()}


def _loader(config: ModelConfig, strategy: dict[str, Any], replicas: int) -> DataLoader[Any]:
    data = Batch(config)
    # Tensor-parallel ranks are neighbours.
    rank = int(os.environ.get("RANK", 0)) // strategy.get("tensor_parallel_size", 1)
    return ResumableDataLoader(
        data, SampleOrder(data, SAMPLES // replicas, replicas=replicas, rank=rank)
    )


def _step(config: ModelConfig, strategy: dict[str, Any], replicas: int) -> Outcome:
    """Loss, `main_grad` and what the optimizer subtracted, of one step on the global batch."""
    losses, module, gradients = Losses(), Imported(config), Gradients()
    trainer = make_trainer(strategy, [losses, gradients], max_steps=1)
    trainer.fit(module, _loader(config, strategy, replicas))
    model = module.model
    before = hugging_face_llama(config).state_dict()
    after = export_llama(model)
    update = {name: before[name].double() - after[name].double() for name in after}
    return losses.values[0], export_llama(model, gradients.values), update


def _steps(rank: int, world: int) -> dict[tuple[str, str], Outcome]:
    join(rank, world)
    return {
        (layout, name): _step(config, strategy, world // strategy.get("tensor_parallel_size", 1))
        for layout, (size, strategy) in LAYOUTS.items()
        for name, config in CONFIGS.items()
        if size == world
    }


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str], list[Outcome]]:
    merged: dict[tuple[str, str], list[Outcome]] = {}
    for world in (1, 2, 4):
        ranks = run_ranks(world, _steps, world)
        merged |= {key: [rank[key] for rank in ranks] for key in ranks[0]}
    return merged


def _expected(config: ModelConfig) -> tuple[float, dict[str, Tensor]]:
    """One process's mean over all tokens of the global batch that count."""
    reference, data = hugging_face_llama(config), Batch(config)
    losses = token_losses(reference, data.tokens, data.labels)
    loss = losses.sum() / (data.labels != -100).sum()
    loss.backward()
    parameters = reference.named_parameters()
    return loss.item(), {name: p.grad for name, p in parameters if p.grad is not None}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_every_gradient(
    outcomes: dict[tuple[str, str], list[Outcome]], layout: str, name: str
) -> None:
    expected_loss, expected = _expected(CONFIGS[name])
    for loss, gradients, update in outcomes[layout, name]:
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert update.keys() == gradients.keys() == expected.keys()
        # Weights of about 0.3 round the update to 2e-8, which shows against small gradients.
        floor = 2e-8 * max(weight.numel() for weight in update.values()) ** 0.5
        for key, wanted in expected.items():
            assert (update[key] - wanted).norm() <= 1e-5 * wanted.norm() + floor, key
            if "sharded" not in layout:  # then every rank holds the sum of its own part only
                assert relative_error(gradients[key], wanted) <= 1e-5, key
