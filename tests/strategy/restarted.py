"""A script that torchrun starts again: once a rank, its node or its pod is ended."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from tests.strategy.runs import Losses, Model, loader, make_trainer

STEPS, DEATH, EVERY = 6, 3, 2


class Death(Callback):
    """Ends one at the end of a step, and once.

    Args:
        mark: a file that is there afterwards.
        what: a `rank`, without a word; a `node`, its torchrun included; or a `pod`, which is told.
    """

    def __init__(self, mark: Path, what: str) -> None:
        self.mark, self.what = mark, what

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        is_due = trainer.global_rank == 1 and trainer.global_step == DEATH
        if is_due and not self.mark.exists():
            self.mark.touch()
            if self.what == "pod":
                os.kill(os.getppid(), signal.SIGTERM)
                return
            if self.what == "node":
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)


class Diary(Losses):
    """Writes the losses of this life after every step, and of which step the first is."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        super().on_train_batch_end(trainer, *args)
        if trainer.global_rank == 0:
            first = trainer.global_step - len(self.values)
            self.file.write_text(json.dumps([first, self.values]))


def main(folder: Path, dies: str = "rank") -> None:
    """Train without an interruption, and then with the `Death` of what `dies`."""
    torch.set_num_threads(1)
    life = os.environ["TORCHELASTIC_RESTART_COUNT"]
    keep = ModelCheckpoint(every_n_train_steps=EVERY, save_on_exception=dies == "pod")
    for name, callbacks in (("straight", []), ("killed", [Death(folder / "died", dies), keep])):
        trainer = make_trainer(
            {"micro_batch_size": 2},
            [Diary(folder / f"{name}-{life}"), *callbacks],
            max_steps=STEPS,
            default_root_dir=folder,
            enable_checkpointing=bool(callbacks),
        )
        trainer.fit(Model(num_layers=1), loader({}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
