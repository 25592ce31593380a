"""The same module under Lightning's own strategies computes what it does under ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dhellam.module import DualStrandMixin
from tests.ranks import run_ranks
from tests.strategy.runs import Losses, Model, Sequences, join, make_trainer, train


class Own(Model):
    """The loss of any module, but as one of its own."""

    def compute_loss(self, logits: Tensor, batch: Any) -> Tensor:
        return DualStrandMixin.compute_loss(self, logits, batch)


def _weighted(weight: float) -> list[dict[str, Tensor]]:
    """Batches in which one token of each sample counts, with little weight."""
    batches = []
    for start in range(0, 8, 2):
        samples = [Sequences()[start + i] for i in range(2)]
        batch = {key: torch.stack([s[key] for s in samples]) for key in ("tokens", "labels")}
        mask = torch.zeros(batch["labels"].shape)
        mask[:, 3] = weight
        batches.append({**batch, "loss_mask": mask})
    return batches


def _packed() -> list[dict[str, Tensor]]:
    """Batches whose samples hold documents, other ones in each, or one."""
    batches = []
    for batch in _weighted(1.0):
        length, place = batch["tokens"].shape[1], torch.arange(batch["tokens"].shape[1])
        second = torch.where(place < 3 + len(batches), place, place - 3 - len(batches))
        positions = torch.stack([torch.arange(length), second])
        batch["loss_mask"] = torch.ones(batch["tokens"].shape)
        batches.append({**batch, "position_ids": positions})
    return batches


def _losses(rank: int, world: int) -> dict[str, list[float]]:
    join(rank, world)
    found = {}
    for strategy in ("auto", "ours"):
        chosen: Any = {"micro_batch_size": 2} if strategy == "ours" else strategy
        for precision in ("32-true", "bf16-mixed"):
            found[f"{strategy} {precision}"] = train(chosen, precision=precision)
        for kind, module in (("plain", Model()), ("own", Own())):
            for weight in (1.0, 0.01, 0.0):
                losses = Losses()
                trainer = make_trainer(chosen, [losses], max_steps=3, use_distributed_sampler=False)
                trainer.fit(module, DataLoader(_weighted(weight), batch_size=None))  # type: ignore[arg-type]
                found[f"{strategy} {kind} {weight}"] = losses.values
                module = type(module)()
            losses = Losses()
            trainer = make_trainer(chosen, [losses], max_steps=3, use_distributed_sampler=False)
            trainer.fit(module, DataLoader(_packed(), batch_size=None))  # type: ignore[arg-type]
            found[f"{strategy} {kind} packed"] = losses.values
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, list[float]]:
    (losses,) = run_ranks(1, _losses, 1)
    return losses


@pytest.mark.parametrize(("precision", "close"), [("32-true", 1e-5), ("bf16-mixed", 0.01)])
def test_precisions(found: dict[str, list[float]], precision: str, close: float) -> None:
    ours, theirs = found[f"ours {precision}"], found[f"auto {precision}"]
    assert len(set(theirs)) == 4
    torch.testing.assert_close(theirs, ours, rtol=close, atol=0)
    assert precision == "32-true" or theirs != found["auto 32-true"]


@pytest.mark.parametrize("kind", ["plain", "own"])
@pytest.mark.parametrize("weight", [1.0, 0.01])
def test_weights_of_tokens(found: dict[str, list[float]], kind: str, weight: float) -> None:
    """Equal weights make the plain mean, however small they are."""
    expected = found["auto plain 1.0"]
    assert min(expected) > 1
    for strategy in ("auto", "ours"):
        losses = found[f"{strategy} {kind} {weight}"]
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
        assert found[f"{strategy} {kind} 0.0"] == [0, 0, 0]


def test_documents_packed_in_samples(found: dict[str, list[float]]) -> None:
    expected = found["auto plain packed"]
    for which in ("auto own", "ours plain", "ours own"):
        torch.testing.assert_close(found[f"{which} packed"], expected, rtol=1e-5, atol=0)
