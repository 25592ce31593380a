"""`ckpt_path="best"` is what a ModelCheckpoint has found, whole, in every loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.strategy.runs import Losses, Model, evaluation, loader, make_trainer
from tests.strategy.test_newest import DATA, _flip

STEPS = 4
WAYS = [{}, {"async_checkpoint": True}]


def _trained(folder: Path, strategy: dict[str, Any]) -> tuple[Trainer, list[float]]:
    """A trainer that has kept the checkpoint of its greatest loss, the first, and its losses."""
    keep = ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, monitor="train_loss", mode="max"
    )
    losses = Losses()
    trainer = make_trainer(strategy, [losses, keep], max_steps=STEPS, enable_checkpointing=True)
    trainer.fit(Model(num_layers=1), loader(strategy))
    assert max(losses.values) == losses.values[0]
    assert [path.name for path in folder.iterdir()] == ["step=1.ckpt"]
    return trainer, [*losses.values]


@pytest.mark.parametrize("strategy", WAYS)
def test_every_loop_takes_the_best(strategy: dict[str, Any], tmp_path: Path) -> None:
    trainer, losses = _trained(tmp_path, strategy)
    best = Model.load_from_checkpoint(tmp_path / "step=1.ckpt", num_layers=1).state_dict()
    wanted = {name: tensor.clone() for name, tensor in best.items() if torch.is_tensor(tensor)}
    for loop in (trainer.validate, trainer.test, trainer.predict):
        module = Model(num_layers=1)
        loop(module, evaluation(strategy), ckpt_path="best")
        found = module.state_dict()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), loop.__name__
    del trainer.callbacks[0].values[:]
    trainer.fit(Model(num_layers=1), loader(strategy), ckpt_path="best")
    assert trainer.callbacks[0].values == losses[1:]


@pytest.mark.parametrize("strategy", WAYS)
def test_a_best_that_is_damaged_is_refused_by_name(
    strategy: dict[str, Any], tmp_path: Path
) -> None:
    trainer, _ = _trained(tmp_path, strategy)
    _flip(tmp_path / "step=1.ckpt" / DATA)
    for loop, data in ((trainer.fit, loader), (trainer.validate, evaluation)):
        with pytest.raises(ValueError, match=rf"step=1.ckpt/{DATA} is damaged: its checksum"):
            loop(Model(num_layers=1), data(strategy), ckpt_path="best")
