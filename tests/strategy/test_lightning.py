"""What a Lightning user expects of a Trainer: loops, logs, callbacks, schedulers, hooks."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from tests.ranks import run_ranks
from tests.strategy.runs import (
    Losses,
    Model,
    Sequences,
    evaluation,
    join,
    loader,
    make_trainer,
    train,
)

Strategy = dict[str, Any] | str
OURS: Strategy = {"micro_batch_size": 3}


class Scheduled(Model):
    """A learning rate that halves at every step."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Gradients(Callback):
    """Norms of the gradients that a hook sees just before the optimizer steps."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(
        self, trainer: Trainer, module: LightningModule, optimizer: Any
    ) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        self.norms.append(torch.nn.utils.get_total_norm(grads).item())


class Skipping(Model):
    """Skips its second batch."""

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Any:
        return None if batch_idx == 1 else super().training_step(batch, batch_idx)


class Weights(Callback):
    """One weight after every batch."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        self.values.append(module.model.final_norm.weight[0].item())


def _loops(strategy: Strategy, folder: Path) -> dict[str, Any]:
    """All four loops of one Trainer, with everything on that is on by default."""
    bar = TQDMProgressBar()
    trainer = make_trainer(
        strategy,
        [LearningRateMonitor(), bar],
        logger=CSVLogger(folder, name="", version=""),
        enable_checkpointing=True,
        enable_progress_bar=True,
        enable_model_summary=True,
        max_epochs=2,
        limit_train_batches=3,
        log_every_n_steps=1,
    )
    module = Scheduled()
    trainer.fit(module, loader(strategy), evaluation(strategy, samples=20))
    shown = bar.get_metrics(trainer, module)
    # A fresh Trainer cannot rely on anything that fitting left behind.
    other = make_trainer(strategy)
    (validated,) = other.validate(module, evaluation(strategy, samples=20), verbose=False)
    (tested,) = other.test(module, evaluation(strategy, samples=12), verbose=False)
    predicted = other.predict(module, DataLoader(Sequences(12), batch_size=8))
    assert predicted is not None
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {
        "validated": validated,
        "tested": tested,
        "predicted": torch.cat(list(predicted)),  # type: ignore[arg-type]
        "train": [float(row["train_loss"]) for row in rows if row["train_loss"]],
        "val": [float(row["val_loss"]) for row in rows if row["val_loss"]],
        "lr": [float(row["lr-AdamW"]) for row in rows if row["lr-AdamW"]],
        "shown": sorted(shown),
        "files": sorted(p.name for p in (folder / "checkpoints").iterdir()),
    }


def _gradients(strategy: Strategy) -> list[float]:
    seen = Gradients()
    train(strategy, callbacks=[seen])
    return seen.norms


def _skipped(strategy: Strategy) -> list[float]:
    seen = Weights()
    trainer = make_trainer(strategy, [seen], max_epochs=1, limit_train_batches=3)
    trainer.fit(Skipping(), loader(strategy))
    return seen.values


def _again(strategy: Strategy) -> list[float]:
    """Two fits of one module."""
    module = Model()
    return [*train(strategy, module), *train(strategy, module)]


def _stopped(strategy: Strategy) -> int:
    never_better = EarlyStopping("val_loss", min_delta=100.0, patience=2)
    trainer = make_trainer(strategy, [never_better], max_epochs=9, limit_train_batches=2)
    trainer.fit(Model(), loader(strategy), evaluation(strategy, samples=8))
    return trainer.current_epoch


def _fast(strategy: Strategy) -> tuple[int, bool]:
    losses = Losses()
    trainer = make_trainer(strategy, [losses], fast_dev_run=True)
    trainer.fit(Model(), loader(strategy), evaluation(strategy))
    return len(losses.values), "val_loss" in trainer.callback_metrics


def _kept(strategy: Strategy, folder: Path) -> tuple[list[str], float, float]:
    best = ModelCheckpoint(
        folder, "{epoch}", monitor="val_loss", mode="max", save_top_k=2, save_last=True
    )
    trainer = make_trainer(
        strategy, [best], enable_checkpointing=True, max_epochs=4, limit_train_batches=2
    )
    trainer.fit(Model(), loader(strategy, samples=16), evaluation(strategy, samples=16))
    # The loss falls, so that by mode="max" the first epochs are the best.
    assert best.best_model_score is not None
    (loaded,) = trainer.validate(
        Model(), evaluation(strategy, samples=16), ckpt_path=best.best_model_path, verbose=False
    )
    return (
        sorted(path.name for path in folder.iterdir()),
        best.best_model_score.item(),
        loaded["val_loss"],
    )


def _dropout(strategy: Strategy) -> dict[str, Any]:
    noisy = Model(hidden_dropout=0.3)
    trainer = make_trainer(strategy, max_steps=1)
    trainer.fit(noisy, loader(strategy))
    validated = [
        trainer.validate(noisy, evaluation(strategy), verbose=False)[0]["val_loss"]
        for _ in range(2)
    ]
    plain = make_trainer("auto").validate(noisy, evaluation("auto"), verbose=False)[0]["val_loss"]
    runs = [train(strategy, Model(hidden_dropout=p)) for p in (0.3, 0.3, 0.0)]
    other_seed = train({"seed": 99}, Model(hidden_dropout=0.3))
    return {"validated": validated, "plain": plain, "runs": runs, "other_seed": other_seed}


def _alone(rank: int, root: Path) -> dict[str, Any]:
    join(rank, 1)
    return {
        "loops": {name: _loops(s, root / name) for name, s in (("auto", "auto"), ("ours", OURS))},
        "gradients": (_gradients("auto"), _gradients(OURS)),
        "skipped": (_skipped("auto"), _skipped(OURS)),
        "again": (_again("auto"), _again(OURS)),
        "stopped": (_stopped("auto"), _stopped(OURS)),
        "fast": _fast(OURS),
        "kept": _kept(OURS, root / "kept"),
        "dropout": _dropout({}),
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (outcome,) = run_ranks(1, _alone, tmp_path_factory.mktemp("alone"))
    return outcome


def test_the_four_loops_give_what_plain_lightning_gives(alone: dict[str, Any]) -> None:
    plain, ours = alone["loops"]["auto"], alone["loops"]["ours"]
    assert ours["validated"]["val_loss"] == pytest.approx(plain["validated"]["val_loss"], rel=2e-6)
    assert ours["tested"]["test_loss"] == pytest.approx(plain["tested"]["test_loss"], rel=2e-6)
    assert ours["predicted"].shape == (12, 8)
    assert torch.equal(ours["predicted"], plain["predicted"])


def test_loggers_and_the_progress_bar_get_every_step(alone: dict[str, Any]) -> None:
    plain, ours = alone["loops"]["auto"], alone["loops"]["ours"]
    assert len(ours["train"]) == 6 and len(ours["val"]) == 2
    torch.testing.assert_close(ours["train"], plain["train"], rtol=2e-6, atol=0)
    torch.testing.assert_close(ours["val"], plain["val"], rtol=2e-6, atol=0)
    assert {"train_loss", "val_loss"} <= set(ours["shown"]) == set(plain["shown"])


def test_the_learning_rate_follows_its_scheduler(alone: dict[str, Any]) -> None:
    expected = [0.01 * 0.5**step for step in range(6)]
    assert alone["loops"]["ours"]["lr"] == pytest.approx(expected)


def test_lightnings_default_checkpoint_is_written(alone: dict[str, Any]) -> None:
    assert alone["loops"]["ours"]["files"] == ["epoch=1-step=6.ckpt"]


def test_hooks_see_the_gradients_before_the_step(alone: dict[str, Any]) -> None:
    plain, ours = alone["gradients"]
    assert len(plain) == 4
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=0)


def test_a_skipped_batch_changes_no_weight(alone: dict[str, Any]) -> None:
    plain, ours = alone["skipped"]
    assert ours[0] != 1.0 and ours[1] == ours[0] and ours[2] != ours[1]
    assert plain[1] == plain[0]


def test_a_module_can_be_fitted_again(alone: dict[str, Any]) -> None:
    plain, ours = alone["again"]
    torch.testing.assert_close(ours, plain, rtol=5e-6, atol=0)


def test_early_stopping_on_a_logged_value(alone: dict[str, Any]) -> None:
    assert alone["stopped"] == (3, 3)


def test_fast_dev_run(alone: dict[str, Any]) -> None:
    assert alone["fast"] == (1, True)


def test_the_best_checkpoints_are_kept_and_load(alone: dict[str, Any]) -> None:
    names, best, loaded = alone["kept"]
    assert names == ["epoch=0.ckpt", "epoch=1.ckpt", "last.ckpt"]
    assert loaded == best


def test_dropout_repeats_with_its_seed_and_is_off_in_evaluation(alone: dict[str, Any]) -> None:
    outcome = alone["dropout"]
    first, second, without = outcome["runs"]
    assert first == second
    assert first[0] != without[0] and first[0] != outcome["other_seed"][0]
    assert outcome["validated"][0] == outcome["validated"][1]
    assert outcome["validated"][0] == pytest.approx(outcome["plain"], rel=2e-6)


# Two ranks


class Seen(Callback):
    """Samples and loss of this rank at each step."""

    def __init__(self) -> None:
        self.samples: list[list[int]] = []
        self.losses: list[float] = []

    def on_train_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Mapping[str, Tensor], *_: Any
    ) -> None:
        self.samples.append(batch["index"].tolist())
        self.losses.append(outputs["loss"].item())


def _seen(strategy: dict[str, Any], shuffle: bool) -> list[list[int]]:
    seen = Seen()
    trainer = make_trainer(strategy, [seen], max_epochs=1)
    trainer.fit(Model(), DataLoader(Sequences(16), batch_size=2, shuffle=shuffle))
    return seen.samples


def _same_samples(dropout: float) -> list[float]:
    """This rank's own losses, where every data-parallel rank is given the same samples."""
    seen = Seen()
    trainer = make_trainer({}, [seen], max_steps=2, use_distributed_sampler=False)
    trainer.fit(Model(hidden_dropout=dropout), evaluation("auto"))
    return seen.losses


def _state_size(strategy: dict[str, Any]) -> tuple[int, int]:
    """Elements of Adam's first moments on this rank, and of the model's parameters."""
    sizes = []

    class Count(Callback):
        def on_train_end(self, trainer: Trainer, module: Any) -> None:
            states = trainer.optimizers[0].state.values()
            sizes.append(sum(state["exp_avg"].numel() for state in states))
            sizes.append(sum(p.numel() for p in module.model.parameters()))

    train(strategy, callbacks=[Count()])
    return sizes[0], sizes[1]


def _logged(folder: Path, rank: int) -> list[float]:
    logger = CSVLogger(folder, name="", version="")
    train({}, logger=logger, log_every_n_steps=1)
    torch.distributed.barrier()
    with (folder / "metrics.csv").open() as file:
        return [float(row["train_loss"]) for row in csv.DictReader(file) if row["train_loss"]]


def _pair(rank: int, root: Path) -> dict[str, Any]:
    join(rank, 2)
    tp: dict[str, Any] = {"tensor_parallel_size": 2}
    pp: dict[str, Any] = {"pipeline_parallel_size": 2}
    return {
        "dp": _seen({}, shuffle=False),
        "dp-shuffled": _seen({}, shuffle=True),
        "tp-shuffled": _seen(tp, shuffle=True),
        "dropout": _same_samples(0.3),
        "no-dropout": _same_samples(0.0),
        "sharded": _state_size({}),
        "whole": _state_size({"distributed_optimizer": False}),
        "logged": _logged(root / "logged", rank),
        "losses": train({}),
        "loops": _loops(tp, root / "loops"),
        "pp-loops": _loops(pp, root / "pp-loops"),
        "pp-shuffled": _seen(pp, shuffle=True),
        "pp-kept": _kept(pp, root / "pp-kept"),
    }


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(2, _pair, tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("name", ["dp", "dp-shuffled"])
def test_data_parallel_ranks_share_the_samples_out(pair: list[dict[str, Any]], name: str) -> None:
    first, second = (list(chain(*rank[name])) for rank in pair)
    assert len(first) == len(second) == 8
    assert sorted(first + second) == list(range(16))


@pytest.mark.parametrize("name", ["tp-shuffled", "pp-shuffled"])
def test_ranks_of_one_model_see_the_same_samples(pair: list[dict[str, Any]], name: str) -> None:
    first, second = (rank[name] for rank in pair)
    assert first == second
    seen = list(chain(*first))
    assert sorted(seen) == list(range(16)) and seen != sorted(seen)


def test_dropout_differs_between_data_parallel_ranks(pair: list[dict[str, Any]]) -> None:
    first, second = pair
    assert first["no-dropout"] == second["no-dropout"]
    assert all(a != b for a, b in zip(first["dropout"], second["dropout"], strict=True))


def test_the_distributed_optimizer_shards_its_state(pair: list[dict[str, Any]]) -> None:
    (first, parameters), (second, _) = (rank["sharded"] for rank in pair)
    assert 0 < first < parameters and first + second == parameters
    assert all(rank["whole"] == (parameters, parameters) for rank in pair)


def test_the_loss_of_the_global_batch_is_logged_once(pair: list[dict[str, Any]]) -> None:
    assert pair[0]["logged"] == pytest.approx(pair[0]["losses"], rel=1e-6)


def test_the_best_checkpoints_of_a_pipeline_load(pair: list[dict[str, Any]]) -> None:
    for rank in pair:
        names, best, loaded = rank["pp-kept"]
        assert names == ["epoch=0.ckpt", "epoch=1.ckpt", "last.ckpt"]
        assert loaded == best


@pytest.mark.parametrize("name", ["loops", "pp-loops"])
def test_the_four_loops_with_model_parallelism(
    alone: dict[str, Any], pair: list[dict[str, Any]], name: str
) -> None:
    plain = alone["loops"]["auto"]
    for rank in pair:
        ours = rank[name]
        assert ours["shown"] == plain["shown"]
        for key in ("train", "val"):
            torch.testing.assert_close(ours[key], plain[key], rtol=2e-6, atol=0)
        assert ours["tested"]["test_loss"] == pytest.approx(plain["tested"]["test_loss"], rel=2e-6)
        assert torch.equal(ours["predicted"], plain["predicted"])
