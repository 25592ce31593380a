"""What the data module says of documents that lie one behind the other in a sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_dhellam import DHellamStrategy
from lightning_dhellam.data.module import IndexedDataModule
from lightning_dhellam.data.prepare import prepare
from lightning_dhellam.data.prepared import PreparedData
from lightning_dhellam.engine.documents import documents_of
from tests.data.test_training import QUIET
from tests.strategy.runs import Losses, Model

LENGTH = 64
OPTIONS = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")


@pytest.fixture
def make(prepared: PreparedData, tmp_path: Path) -> Callable[..., IndexedDataModule]:
    def module(path: Path = prepared.path, **options: Any) -> IndexedDataModule:
        given: dict[str, Any] = {"num_workers": 0, "split": "8,1,1", **options}
        return IndexedDataModule(path, LENGTH, 4, cache_dir=tmp_path / "cache", **given)

    return module


def _begins(tokens: Tensor, eod: int) -> Tensor:
    """After each end a document begins."""
    begins = torch.ones(tokens.shape, dtype=torch.bool)
    begins[:, 1:] = tokens[:, :-1] == eod
    return begins


@pytest.mark.parametrize("asked", list(product([False, True], repeat=3)), ids=str)
def test_options_mean_what_they_do_in_megatron(
    make: Callable[..., IndexedDataModule], asked: Sequence[bool]
) -> None:
    positions_restart, attention_ends, eod_counts_not = asked
    data = make(**dict(zip(OPTIONS, asked, strict=True)))
    assert data.tokenizer is not None
    eod, several = data.tokenizer.eod, 0
    plain = torch.arange(LENGTH).expand(4, LENGTH)
    for batch in data.train_dataloader():
        begins = _begins(batch["tokens"], eod)
        restarting = plain - torch.where(begins, plain, 0).cummax(dim=1).values
        counts = torch.ones(4, LENGTH)
        if eod_counts_not:
            counts[batch["tokens"] == eod] = 0
        assert torch.equal(batch["loss_mask"], counts)
        found = documents_of(batch)
        if found is None:
            assert not begins[:, 1:].any() or not (positions_restart or attention_ends)
            continue
        several += 1
        positions = plain if found.positions is None else found.positions
        assert torch.equal(positions, restarting if positions_restart else plain)
        ends = [(*(row[1:].nonzero().flatten() + 1).tolist(), LENGTH) for row in begins]
        assert list(found.ends) == (ends if attention_ends else [(LENGTH,)] * 4)
    assert bool(several) == (positions_restart or attention_ends)


def test_data_whose_documents_have_no_end_of_their_own_are_refused(
    make: Callable[..., IndexedDataModule],
    megatron_prefix: Callable[[Sequence[Sequence[int]]], Path],
    tmp_path: Path,
) -> None:
    source = tmp_path / "text.txt"
    source.write_text("words and more words\n" * 400)
    options = {"vocab_size": 270, "append_eod": False, "max_document_tokens": 50}
    endless = prepare(source, tmp_path / "endless", progress=False, **options)
    with pytest.raises(ValueError, match=r"^reset_position_ids=True needs documents that end with"):
        make(endless.path, reset_position_ids=True)
    prefix = megatron_prefix([list(range(100))] * 20)
    with pytest.raises(ValueError, match=r"^eod_mask_loss=True .* has none: prepare the data with"):
        make(prefix, vocab_size=100, eod_mask_loss=True)


def test_documents_are_trained_validated_and_predicted(
    make: Callable[..., IndexedDataModule], tmp_path: Path
) -> None:
    options = dict.fromkeys(OPTIONS, True)
    losses: dict[str, list[float]] = {}
    for name, data in (("packed", make(**options)), ("joined", make(eod_mask_loss=True))):
        watch, model = Losses(), Model(vocab_size=data.vocab_size, max_sequence_length=LENGTH)
        trainer = Trainer(
            **QUIET,
            max_steps=3,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
            limit_val_batches=1,
            callbacks=[watch],
            strategy=DHellamStrategy(micro_batch_size=2),
        )
        trainer.fit(model, datamodule=data)
        (validated,) = trainer.validate(model, datamodule=data)
        predicted = trainer.predict(model, datamodule=data)
        assert predicted
        losses[name] = [*watch.values, *validated.values()]
    assert all(loss > 0 for loss in losses["packed"])
    # The same tokens count; documents before change what is foretold.
    assert losses["packed"] != losses["joined"]
    torch.testing.assert_close(losses["packed"], losses["joined"], rtol=0.1, atol=0)
