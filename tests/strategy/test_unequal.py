"""Ranks whose batches differ in what counts learn what one process learns from all of them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_dhellam import DHellamStrategy
from lightning_dhellam.models import export_llama
from tests.ranks import run_ranks
from tests.strategy.runs import LENGTH, Losses, Model, Sequences, join, make_trainer

Batch = dict[str, Tensor]
STEPS = 3
SAMPLES = 6
COUNTS = [[8, 0, 1, 5, 0, 0], [0, 0, 0, 3, 7, 8], [1, 8, 8, 8, 8, 8]]
"""Tokens that count of each sample of each step: on 3 ranks one has none in two of the steps."""
UNEQUAL = {2: [2, 4], 3: [1, 2, 3]}
"""Samples of each rank where they have different numbers."""


class Descending(Model):
    """Trains with SGD, which, other than Adam, sees how large gradients are."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Own(Descending):
    """With a loss of its own, a mean over its samples."""

    def compute_loss(self, logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
        labels = batch["labels"].flatten()
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels, reduction="none", label_smoothing=0.1
        )
        return losses.view(len(logits), -1).mean(1).mean()


MODULES = {"built-in": Descending, "masked": Descending, "own": Own, "samples": Descending}


def global_batches(case: str) -> list[Batch]:
    """The batch of each step, over all ranks."""
    tokens = Sequences(SAMPLES * STEPS).tokens
    batches = []
    for step, counts in enumerate(COUNTS):
        rows = tokens[step * SAMPLES : (step + 1) * SAMPLES]
        counted = torch.arange(LENGTH) < torch.tensor(counts)[:, None]
        batch = {"tokens": rows[:, :-1], "labels": rows[:, 1:].clone()}
        if case in ("built-in", "samples"):
            batch["labels"][~counted] = -100
        elif case == "masked":
            batch["loss_mask"] = counted * torch.linspace(0.1, 1.3, LENGTH)
        batches.append(batch)
    return batches


def of_rank(batch: Batch, case: str, rank: int, ranks: int) -> Batch:
    """The samples of a batch that a data-parallel rank has."""
    sizes = UNEQUAL[ranks] if case in ("own", "samples") else [SAMPLES // ranks] * ranks
    first = sum(sizes[:rank])
    return {name: rows[first : first + sizes[rank]] for name, rows in batch.items()}


class Weights(Callback):
    """The weights in the end, where this rank has all of them."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        assert isinstance(trainer.strategy, DHellamStrategy)
        self.found = {name: w.cpu().clone() for name, w in export_llama(module.model).items()}


def trained(
    case: str, strategy: dict[str, Any], accelerator: str = "cpu"
) -> tuple[list[float], dict[str, Tensor]]:
    """The loss of each step, and the weights in the end."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    tensor = strategy.get("tensor_parallel_size", 1)
    ranks = world // tensor
    batches = global_batches(case)
    if ranks > 1:
        batches = [of_rank(batch, case, rank // tensor, ranks) for batch in batches]
    losses, weights = Losses(), Weights()
    trainer = make_trainer(
        strategy,
        [losses, weights],
        max_steps=STEPS,
        use_distributed_sampler=False,
        accelerator=accelerator,
    )
    data: Any = batches
    trainer.fit(MODULES[case](), DataLoader(data, batch_size=None))
    return losses.values, weights.found


def on_ranks(
    rank: int, world: int, layouts: list[dict[str, Any]], accelerator: str = "cpu"
) -> list[Any]:
    join(rank, world)
    return [trained(case, layout, accelerator) for layout in layouts for case in MODULES]


@pytest.fixture(scope="module")
def expected() -> list[Any]:
    return [trained(case, {"micro_batch_size": 4}) for case in MODULES]


LAYOUTS: dict[int, list[dict[str, Any]]] = {
    2: [{}, {"distributed_optimizer": False, "micro_batch_size": 2}],
    3: [{"bucket_size": 300}],
    4: [{"tensor_parallel_size": 2}],
}


@pytest.mark.parametrize("world", LAYOUTS)
def test_loss_and_weights_are_those_of_one_process_on_the_global_batch(
    expected: list[Any], world: int
) -> None:
    layouts = LAYOUTS[world]
    results = run_ranks(world, on_ranks, world, layouts)
    for rank in results:
        for (losses, weights), (alone, truth) in zip(rank, expected * len(layouts), strict=True):
            torch.testing.assert_close(losses, alone, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(weights, truth, rtol=1e-6, atol=1e-6)


def test_what_is_compared_depends_on_what_counts(expected: list[Any]) -> None:
    ends = [losses[-1] for losses, _ in expected]
    assert all(abs(a - b) > 1e-3 for a, b in pairwise(sorted({round(end, 3) for end in ends})))
    assert len({round(end, 3) for end in ends}) == 3  # unequal samples are the same batches


# Evaluation


class Uneven(Sequences):
    """Sequences of which each counts another number of tokens, some none."""

    def __getitem__(self, index: int) -> Batch:
        item = super().__getitem__(index)
        count = (0, 8, 3, 1, 7)[index % 5]
        return {**item, "labels": item["labels"].where(torch.arange(LENGTH) < count, -100)}


def evaluated(strategy: dict[str, Any] | str, kind: type[Model]) -> list[tuple[float, float]]:
    """Validation and test loss for several batch sizes and numbers of samples."""
    found = []
    for size, samples in ((1, 13), (2, 13), (3, 12), (4, 13), (5, 7), (2, 1)):
        trainer, data = make_trainer(strategy), DataLoader(Uneven(samples), size)
        module = kind()
        (validated,) = trainer.validate(module, data, verbose=False)
        (tested,) = trainer.test(module, data, verbose=False)
        found.append((validated["val_loss"], tested["test_loss"]))
    return found


def evaluated_on_ranks(rank: int, world: int, strategies: list[Any]) -> list[Any]:
    join(rank, world)
    return [evaluated(s, kind) for s in strategies for kind in (Descending, Own)]


def truth(kind: type[Model], samples: int) -> float:
    """The loss over all samples at once, which the module has of plain autograd."""
    module, data = kind(), Uneven(samples)
    trainer = make_trainer("auto")
    (found,) = trainer.validate(module, DataLoader(data, samples), verbose=False)
    return float(found["val_loss"])


@pytest.mark.parametrize(("world", "sizes"), [(1, {}), (3, {}), (4, {"tensor_parallel_size": 2})])
def test_an_evaluation_counts_every_sample_once_whatever_the_batch_size(
    world: int, sizes: dict[str, int]
) -> None:
    strategies: list[Any] = [{"micro_batch_size": 2, **sizes}]
    if not sizes:
        strategies.append("ddp" if world > 1 else "auto")
    for rank in run_ranks(world, evaluated_on_ranks, world, strategies):
        for kind, found in zip((Descending, Own) * len(strategies), rank, strict=True):
            for samples, losses in zip((13, 13, 12, 13, 7, 1), found, strict=True):
                expected = truth(kind, samples)
                assert losses == pytest.approx((expected, expected), rel=1e-6), (kind, samples)


def test_each_of_several_loaders_has_a_mean_of_its_own() -> None:
    found = {}
    for name in ("validate", "test"):
        trainer, module = make_trainer({}), Model()
        loaders = [DataLoader(Sequences(count), batch_size=2) for count in (3, 4)]
        both = getattr(trainer, name)(module, loaders, verbose=False)
        alone = [
            getattr(make_trainer({}), name)(Model(), loader, verbose=False)[0] for loader in loaders
        ]
        key = "val_loss" if name == "validate" else "test_loss"
        found[name] = [own[f"{key}/dataloader_idx_{i}"] for i, own in enumerate(both)]
        assert found[name] == [own[key] for own in alone]
    assert found["validate"] == found["test"] and len(set(found["test"])) == 2
