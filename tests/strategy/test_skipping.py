"""A step that `training_step` skips by returning None, where there are several ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from lightning_dhellam.engine.weights import IGNORED
from tests.ranks import run_ranks
from tests.strategy.runs import Model, join, loader, make_trainer

SIZES: dict[str, dict[str, Any]] = {
    "dp": {},
    "tp": {"tensor_parallel_size": 2},
    "pp": {"pipeline_parallel_size": 2},
}


class Skipping(Model):
    """Skips its second batch on some ranks."""

    def __init__(self, *ranks: int) -> None:
        super().__init__()
        self.ranks = ranks

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Any:
        if batch_idx == 1 and self.global_rank in self.ranks:
            return None
        return super().training_step(batch, batch_idx)


class TooLate(Model):
    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Any:
        self.batch_loss(batch)


class Uncounted(Model):
    """Leaves out the second batch of the last rank."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 1 and self.global_rank == 1:
            batch = {**batch, "labels": torch.full_like(batch["labels"], IGNORED)}
        return super().training_step(batch, batch_idx)


class Steps(Callback):
    """The sum of the weights and what the step gave, after every batch."""

    def __init__(self) -> None:
        self.weights: list[float] = []
        self.outputs: list[Any] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.weights.append(sum(p.double().sum().item() for p in module.parameters()))
        self.outputs.append(outputs)


def _fit(module: Model, sizes: dict[str, Any]) -> Steps:
    steps = Steps()
    trainer = make_trainer(sizes, [steps], max_epochs=1, limit_train_batches=3)
    trainer.fit(module, loader(sizes))
    return steps


def _pair(rank: int) -> dict[str, Any]:
    join(rank, 2)
    skipped = {name: _fit(Skipping(0, 1), sizes) for name, sizes in SIZES.items()}
    with pytest.raises(ValueError, match=r"returned None after self.batch_loss\(batch\)"):
        _fit(TooLate(), {})
    return {
        "weights": {name: steps.weights for name, steps in skipped.items()},
        "outputs": [bool(outputs) for outputs in skipped["dp"].outputs],
        "uncounted": _fit(Uncounted(), {}).weights,
    }


@pytest.fixture(scope="module")
def pair() -> list[dict[str, Any]]:
    return run_ranks(2, _pair)


@pytest.mark.parametrize("name", SIZES)
def test_a_step_that_all_ranks_skip_changes_no_weight(
    pair: list[dict[str, Any]], name: str
) -> None:
    for rank in pair:
        first, second, third = rank["weights"][name]
        assert first == second != third
        assert rank["outputs"] == [True, False, True]


def test_the_batch_of_one_rank_is_left_out_by_its_labels(pair: list[dict[str, Any]]) -> None:
    first, second, third = pair[0]["uncounted"]
    assert len({first, second, third}) == 3
    assert pair[1]["uncounted"] == [first, second, third]
    assert first == pair[0]["weights"]["dp"][0]


def _uneven(rank: int) -> None:
    join(rank, 2)
    _fit(Skipping(1), {})


def test_a_step_that_only_some_ranks_skip_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"returned None on 1 of 2 ranks, .*: to leave out .* labels to -100"
    ):
        run_ranks(2, _uneven)
