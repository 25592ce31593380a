#!/usr/bin/env bash
# lightning 2.6.6 with torch 2.13.0, seen 2026-11-30.
#
# SpikeDetection(mode="min", rtol=0.5) ends training where a loss is worse than the last one and
# differs from the mean of the last `window` losses by half of it or more, in whichever direction. A
# loss of 1.01 that follows 10, 10, 10, 10, 1.0 is 0.01 above the last one and far below the mean, and
# is called a spike. With the default rtol=2.0 no positive loss below its mean differs so much, so that
# only those who ask for a finer detector meet it. We expected a spike to be above the mean.
#
# Why it matters: losses fall steeply in warm-up and after a drop of the learning rate, and never
# fall evenly: the callback then ends a run that does well, and writes two good batches into the file
# of batches to leave out.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q lightning==2.6.6
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import json
import logging
from pathlib import Path

import lightning
import torch
from lightning.fabric.utilities.spike import TrainingSpikeException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import SpikeDetection

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Model(LightningModule):
    """Its losses are its batches."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, index):
        return batch.sum() + 0 * self.weight

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def spike(losses, rtol):
    file = Path("skip.json")
    file.unlink(missing_ok=True)
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[SpikeDetection(mode="min", rtol=rtol, exclude_batches_path=file.absolute())],
    )
    try:
        trainer.fit(Model(), torch.utils.data.DataLoader(torch.tensor(losses)))
        found = None
    except TrainingSpikeException as error:
        found = json.loads(file.read_text())
        print(f"losses {losses}, rtol {rtol}: {error}, batches to leave out {found}")
    else:
        print(f"losses {losses}, rtol {rtol}: no spike")
    return found


print(f"lightning {lightning.__version__}, torch {torch.__version__}")
falls = [10.0, 10.0, 10.0, 10.0, 1.0, 1.01, 0.9]
assert spike([10.0, 10.0, 10.0, 10.0, 10.0, 16.0, 9.0], 0.5) == [4, 5]
assert spike([10.0, 10.0, 10.0, 10.0, 10.0, 10.01, 9.0], 0.5) is None
assert spike(falls, 0.5) == [4, 5], "the behaviour has changed"
assert spike(falls, 2.0) is None, "the behaviour with the default has changed"
PYTHON
