"""Lightning's own callbacks beside the strategy: those that the guide lists change no step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch import Callback, callbacks
from lightning.pytorch.callbacks.spike import SpikeDetection
from lightning.pytorch.loggers import CSVLogger

from tests.strategy.runs import Losses, Model, evaluation, loader, make_trainer

WORK: dict[str, Callable[[Path], Callback]] = {
    "EarlyStopping": lambda _: callbacks.EarlyStopping("train_loss", check_finite=True),
    "LearningRateMonitor": lambda _: callbacks.LearningRateMonitor("step", log_momentum=True),
    "ModelCheckpoint": lambda folder: callbacks.ModelCheckpoint(folder, every_n_train_steps=2),
    "ModelSummary": lambda _: callbacks.ModelSummary(max_depth=3),
    "OnExceptionCheckpoint": lambda folder: callbacks.OnExceptionCheckpoint(folder),
    "RichModelSummary": lambda _: callbacks.RichModelSummary(),
    "SpikeDetection": lambda folder: SpikeDetection(exclude_batches_path=folder / "skip.json"),
    "ThroughputMonitor": lambda _: callbacks.ThroughputMonitor(lambda batch: len(batch["tokens"])),
    "Timer": lambda _: callbacks.Timer("00:01:00:00"),
}


def _losses(folder: Path, *given: Callback) -> list[float]:
    losses = Losses()
    checkpoints = any(isinstance(one, callbacks.Checkpoint) for one in given)
    trainer = make_trainer(
        {},
        [*given, losses],
        max_steps=4,
        logger=CSVLogger(folder),
        log_every_n_steps=1,
        enable_checkpointing=checkpoints,
        default_root_dir=folder,
    )
    trainer.fit(Model(num_layers=1), loader({}))
    return losses.values


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    return _losses(tmp_path_factory.mktemp("without"))


@pytest.mark.filterwarnings("ignore:When using the `ThroughputMonitor`")
@pytest.mark.parametrize("name", WORK)
def test_they_change_no_step(name: str, without: list[float], tmp_path: Path) -> None:
    assert _losses(tmp_path, WORK[name](tmp_path)) == without and len(without) == 4


def test_a_learning_rate_is_found_and_all_else_is_as_before(tmp_path: Path) -> None:
    """It tries rates on a few batches, and puts weights and optimizer back."""
    model, before, seen = Model(num_layers=1, learning_rate=1e-9), list[float](), list[float]()

    class Weights(Callback):
        """The finder leaves other callbacks out while it tries rates."""

        def on_sanity_check_start(self, *_: object) -> None:
            self._note(before)

        def on_train_batch_start(self, *_: object) -> None:
            self._note(seen)

        def _note(self, weights: list[float]) -> None:
            weights.append(sum(p.detach().double().sum().item() for p in model.parameters()))

    finder = callbacks.LearningRateFinder(min_lr=1e-5, max_lr=1e-1, num_training_steps=24)
    finder._early_stop_threshold = None
    trainer = make_trainer(
        {}, [finder, Weights()], max_steps=2, enable_checkpointing=True, default_root_dir=tmp_path
    )
    trainer.fit(model, loader({}, samples=256), evaluation({}))
    assert seen[0] == before[0] != seen[1]
    assert finder.optimal_lr is not None and len(finder.optimal_lr.results["loss"]) == 24
    assert model.learning_rate == finder.optimal_lr.suggestion() != 1e-9
    assert trainer.optimizers[0].param_groups[0]["lr"] == model.learning_rate
