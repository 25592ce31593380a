#!/usr/bin/env bash
# lightning 2.6.6 with torch 2.13.0, seen 2026-11-30.
#
# EMAWeightAveraging(update_starting_at_step=N) begins to average after N steps. Until then its
# average is a copy of the weights that training began with, and it is used as if it were an average:
# validation is of those weights, checkpoints hold them as `state_dict`, and a run that ends before
# step N puts them in the place of the trained ones when it ends. We expected the trained weights
# wherever there is no average yet.
#
# Why it matters: a run that is made shorter than N (a trial, an epoch fewer) gives back an untrained
# model without a word. Validation losses that stand still for N steps look like a model that does not
# learn, and early stopping acts on them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q lightning==2.6.6
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import logging

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Model(LightningModule):
    """One weight that begins at 0 and is to become 3."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.trained, self.validated = [], []

    def training_step(self, batch, index):
        return (self.weight - 3) ** 2

    def on_train_batch_end(self, *_):
        self.trained.append(round(self.weight.item(), 2))

    def validation_step(self, batch, index):
        self.validated.append(round(self.weight.item(), 2))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.25)


def run(start):
    model, batches = Model(), torch.utils.data.DataLoader(torch.ones(6, 1))
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, val_check_interval=1, limit_val_batches=1, logger=False,
        num_sanity_val_steps=0, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[EMAWeightAveraging(decay=0.5, update_starting_at_step=start)],
    )
    trainer.fit(model, batches, batches)
    print(f"averaging from step {start}: weight after each step {model.trained},")
    print(f"  at each validation {model.validated}, after fit {model.weight.item():.2f}")
    return model


print(f"lightning {lightning.__version__}, torch {torch.__version__}")
begun, never = run(3), run(7)
assert begun.trained == never.trained and begun.trained[-1] > 2.9
assert begun.validated[:3] == [0, 0, 0] and begun.validated[3] > 2, "validation has changed"
assert begun.weight > 2.8, "the end of a run with an average has changed"
assert never.validated == [0] * 6, "validation without an average has changed"
assert never.weight == 0, "the end of a run without an average has changed"
PYTHON
