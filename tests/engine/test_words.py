"""Batches in Hugging Face's words become ours, and what they do not say clearly is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dhellam.engine.documents import documents_of
from lightning_dhellam.engine.words import in_our_words
from lightning_dhellam.module import DualStrandMixin
from tests.strategy.runs import Losses, Model, make_trainer

IDS = torch.tensor([[4, 7, 2, 9], [3, 5, 0, 0]])
LABELS = torch.tensor([[-100, 7, 2, 9], [3, 5, -100, -100]])
SHIFTED = torch.tensor([[7, 2, 9, -100], [5, -100, -100, -100]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def _hugging_face(**changes: Any) -> dict[str, Any]:
    return {"input_ids": IDS, "labels": LABELS, "attention_mask": MASK, **changes}


def test_labels_are_shifted_and_the_rest_stays() -> None:
    ours = in_our_words(_hugging_face(name="mine"))
    assert torch.equal(ours["tokens"], IDS) and torch.equal(ours["labels"], SHIFTED)
    assert ours["attention_mask"] is MASK and ours["name"] == "mine"
    assert in_our_words(ours) is ours


def test_padding_says_nothing_of_the_first_token() -> None:
    ids, mask = torch.tensor([[0, 0, 6, 8, 1]]), torch.tensor([[0, 0, 1, 1, 1]])
    labels = torch.where(mask == 0, -100, ids)
    ours = in_our_words({"input_ids": ids, "labels": labels, "attention_mask": mask})
    assert ours["labels"].tolist() == [[-100, -100, 8, 1, -100]]
    found = documents_of(ours)
    assert found is not None and found.positions is None and found.ends == ((2, 5),)


def test_shifted_labels_are_taken_by_their_name() -> None:
    for batch in (
        {"input_ids": IDS, "shift_labels": SHIFTED},
        _hugging_face(shift_labels=SHIFTED),
    ):
        assert torch.equal(in_our_words(batch)["labels"], SHIFTED)


@pytest.mark.parametrize(
    "batch", [None, [1], {"tokens": IDS, "labels": SHIFTED, "input_ids": IDS}, {"text": "a"}]
)
def test_any_other_batch_stays_as_it_is(batch: Any) -> None:
    assert in_our_words(batch) is batch


def test_without_labels_or_with_ones_of_ones_own_only_tokens_are_named() -> None:
    assert in_our_words({"input_ids": IDS}).keys() == {"input_ids", "tokens"}
    labels = torch.tensor([1, 0])
    assert in_our_words({"input_ids": IDS, "labels": labels}, own_labels=True)["labels"] is labels


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": IDS}, "labels that count where attention_mask is 0"),
        ({"labels": SHIFTED}, "4 of the 4 labels .* are the tokens after their own"),
        ({"shift_labels": LABELS}, "labels and shift_labels"),
        ({"loss_mask": torch.ones(2, 4)}, "input_ids and loss_mask"),
    ],
)
def test_what_is_not_clear_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        in_our_words(_hugging_face(**changes))
    assert "\n" not in str(caught.value)


def test_one_token_again_and_again_may_be_shifted_or_not() -> None:
    same = torch.full((2, 8), 5)
    assert in_our_words({"input_ids": same, "labels": same})["labels"][:, -1].tolist() == [-100] * 2


class Seeing(Model):
    """Remembers what a step is given."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert torch.equal(batch["labels"][:, :-1], batch["input_ids"][:, 1:])
        return super().training_step(batch, batch_idx)


class Own(Seeing):
    """A loss of one's own reads labels as they come."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return DualStrandMixin.training_step(self, batch, batch_idx)

    def compute_loss(self, logits: Tensor, batch: Any) -> Tensor:
        assert torch.equal(batch["labels"], batch["input_ids"])
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        )


def test_every_strategy_trains_and_evaluates_the_same(recwarn: pytest.WarningsRecorder) -> None:
    ids = torch.randint(32, (8, 8), generator=torch.Generator().manual_seed(2)).sort().values
    batches = [{"input_ids": half, "labels": half} for half in ids.split(4)]
    loader: Any = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
    found: dict[str, list[float]] = {}
    for name, module in (("plain", Seeing), ("own", Own)):
        for strategy in ("auto", {"micro_batch_size": 2}):
            losses = Losses()
            trainer = make_trainer(strategy, [losses], max_steps=2, num_sanity_val_steps=0)
            trained, data = module(), LightningDataModule.from_datasets([])
            data.train_dataloader = data.val_dataloader = lambda: loader  # type: ignore[method-assign]
            trainer.fit(trained, datamodule=data)
            values = [*losses.values, trainer.callback_metrics["val_loss"].item()]
            predicted = trainer.predict(trained, loader)
            assert predicted is not None and [p.shape for p in predicted] == [(4, 8)] * 2
            found[f"{name} {strategy}"] = values
    assert not [
        warning for warning in recwarn if "on_before_batch_transfer" in str(warning.message)
    ]
    first, *others = found.values()
    assert first[0] > first[1]
    for values in others:
        assert values == pytest.approx(first, rel=1e-5)
