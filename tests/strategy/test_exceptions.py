"""An exception that comes up on one rank, or on all of them, where a callback saves on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.ranks import RankTraceback, run_ranks
from tests.strategy.runs import Model, join, loader, make_trainer


class Raises(Callback):
    """Raises after the third step, on some ranks."""

    def __init__(self, *ranks: int) -> None:
        self.ranks = ranks

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == 3 and trainer.global_rank in self.ranks:
            raise KeyError("the user's")


def _fit(folder: Path, *ranks: int) -> None:
    saves = ModelCheckpoint(folder, "{step}", save_on_exception=True, save_last=True)
    trainer = make_trainer({}, [Raises(*ranks), saves], enable_checkpointing=True, max_steps=6)
    trainer.fit(Model(), loader({}))


def _on_all(rank: int, folder: Path) -> int:
    with pytest.raises(KeyError):
        _fit(folder, 0, 1)
    (saved,) = folder.glob("step=*.ckpt")
    trainer = make_trainer({}, max_steps=6)
    trainer.fit(Model(), loader({}), ckpt_path=saved)
    return trainer.global_step - int(saved.stem.partition("=")[2])


def _on_one(rank: int, folder: Path, victim: int) -> None:
    join(rank, 2)
    assert _on_all(rank, folder / "all") == 3
    _fit(folder / "one", victim)


@pytest.mark.parametrize("victim", [0, 1])
def test_one_rank_saves_nothing_and_its_error_is_what_ends_the_job(
    victim: int, tmp_path: Path
) -> None:
    # Were the rank to wait for the others, the collectives' time-out would come first.
    with pytest.raises(KeyError, match="the user's") as error:
        run_ranks(2, _on_one, tmp_path, victim, timeout=600)
    assert isinstance(error.value.__cause__, RankTraceback)
    assert f"[rank {victim}]" in str(error.value.__cause__)
    # What all ranks raised together was saved, and went on.
    assert [path.name for path in (tmp_path / "all").glob("step*")] == ["step=3.ckpt"]
    assert not list((tmp_path / "one").glob("*"))
