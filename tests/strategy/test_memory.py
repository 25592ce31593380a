"""A run's memory is predicted at its first batch: refused if it cannot fit, compared in the end."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lightning_dhellam.memory import prediction
from lightning_dhellam.memory.fitting import SHARE
from lightning_dhellam.plan import nominal
from tests.strategy.runs import Losses, Model, loader, make_trainer


class Frozen(Model):
    """Of which the first layer is not trained."""

    def configure_optimizers(self) -> Any:
        self.model.layers[0].requires_grad_(False)
        return torch.optim.SGD(self.parameters(), lr=self.learning_rate, momentum=0.9)


def _losses(strategy: dict[str, Any], model: Model, steps: int = 3) -> list[float]:
    losses = Losses()
    torch.manual_seed(3)
    make_trainer(strategy, [losses], max_steps=steps).fit(model, loader(strategy))
    return losses.values


@pytest.mark.parametrize("kind", [Model, Frozen])
def test_predicted_is_measured_and_changes_nothing(
    kind: type[Model], caplog: pytest.LogCaptureFixture
) -> None:
    strategy = {"micro_batch_size": 3, "recompute": "selective", "plan": "dhellam"}
    dropping = {"hidden_dropout": 0.1}
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        watched = _losses({**strategy, "memory_limit": "1GiB"}, kind(**dropping))
    (line,) = (r.message for r in caplog.records if r.message.startswith("memory in GiB"))
    found = re.fullmatch(r"memory in GiB: rank 0 (\S+) predicted, (\S+) measured", line)
    # Three steps have taken what one was predicted to: nothing grows.
    assert found is not None and found[1] == found[2]
    assert watched == _losses(strategy, kind(**dropping))


class Held(Callback):
    """What a run holds besides slots, and the most bytes of those."""

    states = peak = 0
    away: Any = None

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.states = trainer.strategy.runner.model_states.total
        self.peak = trainer.strategy.runner.engine.lanes.ledger.peak_bytes
        self.away = trainer.strategy.runner.agreed.offload


@pytest.mark.parametrize(("offload", "share"), [(None, 0.8), ("auto", 0.7)])
def test_auto_is_predicted_as_it_chooses(
    offload: str | None,
    share: float,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nominal, "HOST_LINK", 1e5 * nominal.HOST_LINK)  # so fast that all hides
    held, peaks = Held(), []
    limit = "1GiB"
    for _ in range(2):
        caplog.clear()
        strategy = {"micro_batch_size": 3, "recompute": "auto", "memory_limit": limit}
        strategy["offload"] = offload
        with caplog.at_level(logging.INFO, "lightning.pytorch"):
            make_trainer(strategy, [held], max_steps=1).fit(Model(num_layers=6), loader(strategy))
        (line,) = (r.message for r in caplog.records if r.message.startswith("memory in GiB"))
        found = re.fullmatch(r"memory in GiB: rank 0 (\S+) predicted, (\S+) measured", line)
        assert found is not None and found[1] == found[2]
        peaks.append(held.peak)
        limit = f"{(held.states + share * held.peak) / SHARE / 2**20:.6f}MiB"
    assert peaks[1] <= (share + 0.05) * peaks[0]
    assert bool(held.away) is (offload is not None)


def test_what_cannot_fit_is_refused_with_the_cheapest_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prediction, "WORKSPACE", 0)  # which would be all of it
    strategy = {"micro_batch_size": 8, "memory_limit": "0.17MiB"}
    wanted = (
        r"would take 0.214 MiB on a rank of stage 0, and memory_limit leaves 0.17 MiB:"
        r" recompute='selective', micro_batch_size=4 would fit; a larger memory_limit="
    )
    with pytest.raises(ValueError, match=wanted) as error:
        _losses(strategy, Model())
    assert "\n" not in str(error.value)
    _losses({**strategy, "recompute": "selective", "micro_batch_size": 4}, Model(), steps=1)


def test_what_nothing_can_make_fit() -> None:
    with pytest.raises(ValueError, match=r"use more ranks, or a smaller model; a larger memory_li"):
        _losses({"memory_limit": "0.01MiB"}, Model())


def test_what_is_offloaded_is_predicted_and_changes_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    strategy = {"micro_batch_size": 3, "recompute": "full"}
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        moved = _losses({**strategy, "offload": ["x"], "memory_limit": "1GiB"}, Model())
    (line,) = (r.message for r in caplog.records if r.message.startswith("memory in GiB"))
    found = re.fullmatch(r"memory in GiB: rank 0 (\S+) predicted, (\S+) measured", line)
    assert found is not None and found[1] == found[2]
    assert moved == _losses(strategy, Model())
    with pytest.raises(ValueError, match=r"offload names 'gate_upp', which no layer has.*gate_up"):
        _losses({**strategy, "offload": ["gate_upp"]}, Model())
    with pytest.raises(ValueError, match="offload='x' must be 'all', 'auto' or a list"):
        _losses({**strategy, "offload": "x"}, Model())
