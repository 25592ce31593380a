"""The data module under real Lightning Trainers: sampling, epochs, restarts, several ranks."""

import os
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_dhellam.data.module import IndexedDataModule, TokenBatch
from lightning_dhellam.data.prepared import PreparedData
from tests.ranks import run_ranks

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Recorder(LightningModule):
    """Trains nothing and remembers the batches it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list[list[list[int]]]] = {"train": [], "val": [], "predict": []}

    def training_step(self, batch: TokenBatch) -> torch.Tensor:
        self.seen["train"].append(batch["tokens"].tolist())
        return self.weight * 1.0

    def validation_step(self, batch: TokenBatch) -> None:
        self.seen["val"].append(batch["tokens"].tolist())

    def predict_step(self, batch: TokenBatch) -> None:
        self.seen["predict"].append(batch["tokens"].tolist())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _data(path: Path, cache: Path, **options: Any) -> IndexedDataModule:
    given: dict[str, Any] = {"num_workers": 0, "split": "8,1,1", "cache_dir": cache, **options}
    return IndexedDataModule(path, 16, 4, **given)


def _fit(data: IndexedDataModule, resume: Path | None = None, **options: Any) -> list[Any]:
    model = Recorder()
    Trainer(**QUIET, **options).fit(model, datamodule=data, ckpt_path=resume, weights_only=False)
    return model.seen["train"]


def test_fit_validate_and_predict_see_the_loaders_batches(
    prepared: PreparedData, tmp_path: Path
) -> None:
    data = _data(prepared.path, tmp_path / "cache")
    model = Recorder()
    trainer = Trainer(**QUIET, max_epochs=1, enable_checkpointing=False, default_root_dir=tmp_path)
    trainer.fit(model, datamodule=data)
    assert model.seen["train"] == [batch["tokens"].tolist() for batch in data.train_dataloader()]
    model.seen["val"].clear()
    trainer.validate(model, datamodule=data)
    validation = data.val_dataloader()
    assert isinstance(validation, DataLoader)
    assert model.seen["val"] == [batch["tokens"].tolist() for batch in validation]
    trainer.predict(model, datamodule=data)
    assert sum(map(len, model.seen["predict"])) == len(data.predict_dataloader().dataset)  # type: ignore[arg-type]


def test_fit_without_a_validation_share(prepared: PreparedData, tmp_path: Path) -> None:
    data = _data(prepared.path, tmp_path / "cache", split="1,0,0")
    seen = _fit(data, max_steps=2, enable_checkpointing=False, default_root_dir=tmp_path)
    assert len(seen) == 2


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("limit", [1.0, 7], ids=["whole-epochs", "limited-epochs"])
@pytest.mark.parametrize("stop", [3, 7, 10], ids=lambda steps: f"stop-at-{steps}")
def test_a_restart_goes_on_where_training_stopped(
    prepared: PreparedData, tmp_path: Path, num_workers: int, limit: float, stop: int
) -> None:
    options: dict[str, Any] = {"limit_train_batches": limit, "limit_val_batches": 0}
    options["default_root_dir"] = tmp_path

    def data() -> IndexedDataModule:
        return _data(prepared.path, tmp_path / "cache", num_workers=num_workers, train_samples=40)

    straight = _fit(data(), max_steps=24, enable_checkpointing=False, **options)
    keep = ModelCheckpoint(
        tmp_path / "kept", filename="at-{step}", every_n_train_steps=1, save_top_k=-1
    )
    before = _fit(data(), max_steps=stop, callbacks=[keep], **options)
    checkpoint = tmp_path / "kept" / f"at-step={stop}.ckpt"
    after = _fit(data(), checkpoint, max_steps=24, enable_checkpointing=False, **options)
    assert before == straight[:stop]
    assert after == straight[stop:]


def _fit_as_rank(rank: int, path: Path, root: Path) -> tuple[list[Any], list[Any], list[Any]]:
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    data = _data(path, root / "cache")
    model = Recorder()
    trainer = Trainer(
        **QUIET,
        devices=2,
        strategy="ddp",
        max_epochs=1,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        default_root_dir=root,
    )
    trainer.fit(model, datamodule=data)
    plain = _data(path, root / "cache")
    order = [sample for batch in plain.train_dataloader() for sample in batch["tokens"].tolist()]
    return model.seen["train"], model.seen["val"], order


def test_data_parallel_ranks_share_each_step_in_order(
    prepared: PreparedData, tmp_path: Path
) -> None:
    (first, first_val, order), (second, second_val, same) = run_ranks(
        2, _fit_as_rank, prepared.path, tmp_path
    )
    assert order == same
    assert len(first) == len(second) > 2
    dealt = [sample for a, b in zip(first, second, strict=True) for sample in _dealt(a, b)]
    assert dealt == order[: len(dealt)]
    assert len(first_val) == len(second_val)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def _dealt(first: list[Any], second: list[Any]) -> list[Any]:
    return [sample for pair in zip(first, second, strict=True) for sample in pair]


def _setup_with_a_failing_first_rank(rank: int, path: Path, root: Path) -> str:
    data = _data(path, root / "cache")
    if rank == 0:
        (root / "cache").write_text("in the way of the cache directory")
    torch.distributed.barrier()
    try:
        data.setup()
    except (OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def test_no_rank_hangs_when_the_first_cannot_build(prepared: PreparedData, tmp_path: Path) -> None:
    first, second = run_ranks(
        2, _setup_with_a_failing_first_rank, prepared.path, tmp_path, timeout=600
    )
    assert first.startswith(("FileExistsError", "NotADirectoryError"))
    assert second.startswith("RuntimeError")
    assert "rank 0 could not build the index cache" in second


def _kept(data: IndexedDataModule, folder: Path, steps: int) -> Path:
    keep = ModelCheckpoint(folder / "kept", filename="at-{step}", every_n_train_steps=1)
    options: dict[str, Any] = {"limit_val_batches": 0, "default_root_dir": folder}
    _fit(data, max_steps=steps, callbacks=[keep], **options)
    return folder / "kept" / f"at-step={steps}.ckpt"


@pytest.mark.parametrize("batch_size", [2, 8])
@pytest.mark.parametrize("stop", [6, 20], ids=["mid-epoch", "second-epoch"])
def test_another_batch_size_goes_on_with_the_next_sample(
    prepared: PreparedData, tmp_path: Path, batch_size: int, stop: int
) -> None:
    def data(batch_size: int = 4) -> IndexedDataModule:
        options: dict[str, Any] = {"num_workers": 0, "split": "8,1,1", "train_samples": 64}
        return IndexedDataModule(
            prepared.path, 16, batch_size, cache_dir=tmp_path / "cache", **options
        )

    options: dict[str, Any] = {"limit_val_batches": 0, "enable_checkpointing": False}
    options["default_root_dir"] = tmp_path
    straight = [*chain(*_fit(data(), max_steps=stop + 10, **options))]
    checkpoint = _kept(data(), tmp_path, stop)
    resumed = [*chain(*_fit(data(batch_size), checkpoint, max_steps=stop + 4, **options))]
    assert len(resumed) >= 8
    assert resumed == straight[4 * stop : 4 * stop + len(resumed)]


@pytest.mark.parametrize(
    "change", [{"seed": 9}, {"split": "7,1,1"}, {"sequence_length": 8}], ids=lambda c: next(iter(c))
)
def test_a_checkpoint_of_another_order_is_refused(
    prepared: PreparedData, tmp_path: Path, change: dict[str, Any]
) -> None:
    def data(**changes: Any) -> IndexedDataModule:
        given: dict[str, Any] = {"sequence_length": 16, "num_workers": 0, "split": "8,1,1"}
        given |= {"cache_dir": tmp_path / "cache", **changes}
        return IndexedDataModule(prepared.path, batch_size=4, **given)

    checkpoint = _kept(data(), tmp_path, 3)
    (name,) = change
    with pytest.raises(ValueError, match=rf"trained on data with {name}=.*, this run has {name}="):
        _fit(data(**change), checkpoint, max_steps=5, default_root_dir=tmp_path)
