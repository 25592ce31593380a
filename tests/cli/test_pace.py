"""The demo trains for about three minutes, on a fast machine and on a slow one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from torch.optim.lr_scheduler import LambdaLR

from lightning_dhellam.autosearch import AutoSearch
from lightning_dhellam.commands.main import main
from lightning_dhellam.commands.pace import Pace
from tests.strategy.runs import Model, loader, make_trainer


class Decaying(Model):
    """Its learning rate falls in a line, to what is left at the last step."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = LambdaLR(
            optimizer, lambda step: 1 - step / self.trainer.estimated_stepping_batches
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def _timed(pace: Pace, seconds: Callable[[int], float]) -> tuple[Trainer, Decaying]:
    """Train on a machine whose clock says `seconds` after each step."""
    trainer = make_trainer({}, [pace], max_steps=30, max_epochs=-1)
    pace.clock = lambda: seconds(trainer.global_step)
    module = Decaying()
    trainer.fit(module, loader({}))
    return trainer, module


def test_steps_fill_the_time_of_a_fast_machine(capsys: pytest.CaptureFixture[str]) -> None:
    # 5 s until the first step is done, then half a second each.
    trainer, module = _timed(Pace(seconds=25.0, fewest=5), lambda step: 5.0 * (step > 0) + step / 2)
    assert trainer.global_step == 40, "of which the recipe has 30"
    assert (
        "pace: 11 steps and the search took 10 s, and a step takes 500 ms: 40 steps in all"
        " will take about 0.4 minutes" in capsys.readouterr().out
    )
    assert module.optimizers().param_groups[0]["lr"] == pytest.approx(0.0, abs=1e-9)


def test_a_slow_machine_does_fewer_steps_but_enough() -> None:
    assert _timed(Pace(seconds=60.0, fewest=5), lambda step: 4.0 * step)[0].global_step == 15
    assert _timed(Pace(seconds=60.0, fewest=18), lambda step: 10.0 * step)[0].global_step == 18
    assert _timed(Pace(seconds=60.0, fewest=5), lambda step: 10.0 * step)[0].global_step == 11


def test_a_machine_that_becomes_faster_does_more_steps(capsys: pytest.CaptureFixture[str]) -> None:
    trainer, _ = _timed(Pace(seconds=60.0, fewest=5), lambda step: min(step, 11) + step / 2)
    assert 1.0 * 11 + trainer.global_step / 2 == pytest.approx(60.0, rel=0.1)
    assert capsys.readouterr().out.count("pace: ") > 1


def test_speed_is_told_when_the_search_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = Pace(seconds=50.0, fewest=5)
    trainer = make_trainer({}, [pace], max_steps=30, max_epochs=-1)

    class Search:
        @property
        def over(self) -> bool:
            return trainer.global_step >= 12

    monkeypatch.setattr(AutoSearch, "of", classmethod(lambda cls, trainer: Search()))
    # Steps of the search take 3 s.
    pace.clock = lambda: 3.0 * min(trainer.global_step, 12) + 0.5 * max(trainer.global_step - 12, 0)
    trainer.fit(Model(), loader({}))
    assert trainer.global_step == 40, "36 s of search, and 14 s of steps"


@pytest.mark.parametrize(("words", "paced"), [([], True), (["--max_steps", "7"], False)])
def test_the_demo_keeps_pace_unless_it_is_told_how_many_steps(
    words: list[str], paced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr("lightning_dhellam.commands.data.data_command", lambda _: 0)
    monkeypatch.setattr("lightning_dhellam.commands.fit.run_lightning", asked.append)
    assert main(["demo", "--folder", str(tmp_path), *words]) == 0
    given = " ".join(asked[0])
    assert ("commands.pace.Pace" in given) is paced
    assert ("--trainer.max_steps 7" in given) is not paced
