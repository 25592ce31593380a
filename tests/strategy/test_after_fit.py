"""What a run leaves behind, and what its arguments really change."""

from __future__ import annotations

import gc
import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dhellam import DHellamStrategy
from lightning_dhellam.callbacks import PredictionWriter, RunSummary, SaveEnd
from lightning_dhellam.checkpoint.folder import load_common
from lightning_dhellam.models import export_llama
from lightning_dhellam.parallel import context
from tests.ranks import run_ranks
from tests.strategy.runs import (
    GLOBAL_BATCH,
    LENGTH,
    Model,
    Sequences,
    evaluation,
    join,
    loader,
    make_trainer,
    train,
)


def test_seed_decides_the_weights_and_none_takes_the_one_of_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def first(seed: int | None) -> float:
        return train({"seed": seed}, max_steps=1)[0]

    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert first(1) == first(1) != first(2)
    assert first(None) == first(1234)
    monkeypatch.setenv("PL_GLOBAL_SEED", "2")
    assert first(None) == first(2)


def test_gradients_that_nobody_computed_are_noticed() -> None:
    class OwnStep(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.model(batch["tokens"]).float().mean()  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match=r"without self\.batch_loss\(batch\)"):
        train({}, OwnStep(), max_steps=1)


@pytest.mark.parametrize("sharded", [True, False])
def test_a_module_trains_under_another_strategy_afterwards(sharded: bool) -> None:
    model = Model()
    train({"distributed_optimizer": sharded}, model, max_steps=2)
    gc.collect()
    assert not any(hasattr(p, "main_grad") for p in model.parameters())
    before = [p.detach().clone() for p in model.parameters()]
    trainer = make_trainer("auto", max_steps=1)
    trainer.fit(model, loader("auto"))
    changed = [not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)]
    assert all(changed)


def test_a_checkpoint_can_be_saved_after_the_run(tmp_path: Path) -> None:
    trainer = make_trainer({}, max_steps=2)
    model = Model()
    trainer.fit(model, loader({}))
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    again, other = make_trainer({}, max_steps=3), Model()
    again.fit(other, loader({}), ckpt_path=str(tmp_path / "after.ckpt"))
    assert again.global_step == 3


def open_groups() -> int:
    return len(dist.distributed_c10d._world.pg_map)


def used_again(
    rank: int, sizes: dict[str, int], shape: dict[str, Any], accelerator: str = "cpu"
) -> None:
    join(rank, 2)
    model = Model(**shape)
    trainer = make_trainer(sizes, max_steps=2, accelerator=accelerator)
    trainer.fit(model, loader(sizes))
    assert isinstance(trainer.strategy, DHellamStrategy)
    count, groups = open_groups(), trainer.strategy.context.groups
    trainer.validate(model, evaluation(sizes), verbose=False)
    first, second = (
        train(sizes, Model(**shape), max_steps=3, accelerator=accelerator) for _ in range(2)
    )
    assert first == second and len(first) == 3
    assert open_groups() == count
    assert groups is trainer.strategy.context.groups
    # The model goes on with them.
    assert export_llama(model.model)


@pytest.mark.parametrize("size", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_runs_of_the_same_sizes_use_the_same_groups(size: str) -> None:
    run_ranks(2, used_again, {size: 2}, {})


def not_used_again(rank: int) -> None:
    join(rank, 2)

    class Failing(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            raise ZeroDivisionError

    expected = train({}, max_steps=3)
    counts = [open_groups()]
    with pytest.raises(ZeroDivisionError):
        train({}, callbacks=[Failing()])
    assert train({}, max_steps=3) == expected
    counts.append(open_groups())
    if rank == 1:
        context._kept = None  # as if only this rank had failed
    assert train({}, max_steps=3) == expected
    counts.append(open_groups())
    # Of other sizes, and again of those before.
    assert len(train({"tensor_parallel_size": 2}, max_steps=3)) == 3
    assert train({}, max_steps=3) == expected
    counts.append(open_groups())
    assert counts == sorted(set(counts))


def test_groups_are_not_used_again_after_a_failure_on_any_rank_or_for_other_sizes() -> None:
    run_ranks(2, not_used_again)


def logged(rank: int, sizes: dict[str, int]) -> tuple[float, float]:
    join(rank, 2)

    class Counting(Model):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            count = float(batch["tokens"].shape[0])
            self.log("samples", count, sync_dist=True, reduce_fx="sum")
            self.log("mean", float(rank), sync_dist=True)
            return self.batch_loss(batch)

    trainer = make_trainer(sizes, max_steps=1)
    trainer.fit(Counting(), loader(sizes))
    metrics = trainer.callback_metrics
    return metrics["samples"].item(), metrics["mean"].item()


def test_logged_values_are_reduced_over_data_parallel_ranks_only() -> None:
    alone, copies = (run_ranks(2, logged, sizes) for sizes in ({}, {"tensor_parallel_size": 2}))
    assert alone[0] == alone[1] and alone[0][1] == 0.5
    assert [samples for samples, _ in copies] == [copies[0][0]] * 2
    assert copies[0][0] == GLOBAL_BATCH


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"plan": None}, "plan=None must be a string"),
        ({"timeout": 30}, r"timeout=30 must be a datetime\.timedelta"),
        ({"kernels": ["flash"]}, "must be a mapping from operator to backend"),
    ],
)
def test_arguments_of_another_type_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DHellamStrategy(**arguments)
    DHellamStrategy(timeout=timedelta(seconds=5))


def test_the_mean_of_compute_loss_counts_what_the_built_in_loss_counts() -> None:
    class Own(Model):
        def compute_loss(self, logits: Tensor, batch: Any) -> Tensor:
            return super().compute_loss(logits, batch)

    batch = {
        "tokens": torch.arange(12).view(2, 6),
        "labels": torch.tensor([[1, 2, 3, -100, 4, 5]] * 2),
        "loss_mask": torch.tensor([[1.0, 0.0, 1.0, 1.0, 1.0, 0.0]] * 2),
    }
    logits = torch.randn(2, 6, 32)
    mine = Own().compute_loss(logits, batch)
    losses = -logits.log_softmax(-1).gather(-1, batch["labels"].clamp_min(0)[..., None])[..., 0]
    weights = (batch["labels"] >= 0) * batch["loss_mask"]
    assert mine.item() == pytest.approx(((losses * weights).sum() / weights.sum()).item())
    nothing = {**batch, "labels": torch.full((2, 6), -100)}
    assert Own().compute_loss(logits, nothing).item() == 0.0


def test_the_end_of_a_run_is_saved_or_it_is_said_that_nothing_was(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    def fit(steps: int, *callbacks: Callback, **resume: Any) -> str:
        saves = any(isinstance(c, ModelCheckpoint) for c in callbacks)
        trainer = make_trainer({}, callbacks, max_steps=steps, enable_checkpointing=saves)
        caplog.clear()
        with caplog.at_level("INFO"):
            trainer.fit(Model(), loader({}, samples=64), **resume)
        return caplog.text

    def keep(every: int) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=every)

    last = tmp_path / "last.ckpt"
    assert f"checkpoint of step 3: {last}" in fit(3, keep(2), SaveEnd(), RunSummary())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "step=2.ckpt"]
    assert "checkpoint  none" not in capsys.readouterr().out
    said = fit(4, keep(2), SaveEnd(), ckpt_path="last")
    assert f"Restored all states from the checkpoint at {last}" in said
    assert f"checkpoint of step 4: {tmp_path / 'step=4.ckpt'}" in said
    assert load_common(last)["global_step"] == 3
    assert "no checkpoint of step 1 was saved: checkpoints are switched off" in fit(1, SaveEnd())
    capsys.readouterr()
    fit(1, keep(2), RunSummary())
    assert "checkpoint  none was saved" in capsys.readouterr().out


def _predictions(rank: int, world: int, folder: Path) -> list[list[dict[str, Any]]]:
    join(rank, world)
    found = []
    for name, strategy in (("dp", {}), ("tp", {"tensor_parallel_size": 2})):
        options: dict[str, Any] = {"default_root_dir": folder / name}
        trainer = make_trainer(strategy, [PredictionWriter()], **options)
        trainer.predict(Model(), DataLoader(Sequences(10), 2), return_predictions=False)
        file = folder / name / "predictions.jsonl"
        found.append([json.loads(line) for line in file.read_text().splitlines()])
        assert [path.name for path in (folder / name).iterdir()] == ["predictions.jsonl"]
    return found


def test_predictions_are_written_once_for_each_sample_whatever_the_ranks(tmp_path: Path) -> None:
    for replicas, parallel in run_ranks(2, _predictions, 2, tmp_path):
        assert [line["sample"] for line in replicas] == list(range(10))
        assert all(len(line["prediction"]) == LENGTH for line in replicas)
        assert replicas == parallel


def test_predictions_of_any_form_are_written(tmp_path: Path) -> None:
    class Means(Model):
        def predict_step(self, batch: Any, batch_idx: int) -> Any:
            return {"mean": batch["tokens"].float().mean()}

    file = tmp_path / "below" / "mine.jsonl"
    trainer = make_trainer({}, [PredictionWriter(str(file))])
    trainer.predict(Means(), evaluation({}, samples=12))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["batch"] for line in lines] == [0, 1]
    assert all(0 < line["prediction"]["mean"] < 32 for line in lines)
