"""What a Trainer logs of experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from lightning_dhellam.callbacks import ExpertLoad
from tests.strategy.runs import GLOBAL_BATCH, LENGTH, Model, loader, make_trainer

EXPERTS = {
    "num_experts": 4,
    "router_scores": "sigmoid",
    "router_bias_update_rate": 0.5,
    "aux_loss": "seq_aux_loss",
    "aux_loss_coefficient": 0.01,
    "z_loss_coefficient": 0.001,
}


class Logged(Callback):
    """Remembers what every step has logged, and the biases that it ended with."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.biases: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self.steps.append({name: v.item() for name, v in trainer.callback_metrics.items()})
        self.biases.append(pl_module.model.layers[0].mlp.router.expert_bias.clone())


def test_losses_and_load_are_logged_and_drawn(tmp_path: Path) -> None:
    logged, strategy = Logged(), {"micro_batch_size": 4}
    trainer = make_trainer(
        strategy,
        [ExpertLoad(per_layer=True), logged],
        max_steps=3,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
    )
    model = Model(**EXPERTS)
    trainer.fit(model, loader(strategy))
    names = {"seq_load_balancing_loss", "z_loss", "expert_load", "expert_load/layer_0"}
    assert all(names <= step.keys() for step in logged.steps)
    for step in logged.steps:
        assert 1 <= step["expert_load"] <= 4
        layers = [step[f"expert_load/layer_{layer}"] for layer in (0, 1)]
        assert step["expert_load"] == pytest.approx(sum(layers) / 2)
    use = trainer.strategy.runner.expert_use  # type: ignore[attr-defined]
    assert use.load.sum(1).tolist() == [2.0 * GLOBAL_BATCH * LENGTH] * 2
    # The first step moves each bias once, before the second chooses with it.
    assert logged.biases[0].abs().unique().tolist() in ([0.5], [0.0, 0.5])
    assert trainer.log_dir is not None
    assert (Path(trainer.log_dir) / "expert-load.png").stat().st_size > 1000
    text = (Path(trainer.log_dir) / "metrics.csv").read_text()
    assert "seq_load_balancing_loss" in text and "expert_load/layer_1" in text


def test_without_experts_nothing_is_logged_of_them(tmp_path: Path) -> None:
    strategy = {"micro_batch_size": 4}
    trainer = make_trainer(strategy, [ExpertLoad()], max_steps=1, default_root_dir=tmp_path)
    trainer.fit(Model(), loader(strategy))
    assert not any("expert" in name or "z_loss" in name for name in trainer.callback_metrics)
    assert not list(tmp_path.rglob("*.png"))
