#!/usr/bin/env bash
# lightning 2.6.6 with torch 2.13.0, seen 2026-11-29.
#
# A training DataLoader with `state_dict` and `load_state_dict` has its state put into every
# checkpoint. When a Trainer with `max_epochs` resumes, `load_state_dict` is called if the checkpoint
# was taken in the middle of an epoch, and not called if it was taken at the end of one (by the
# `save_on_train_epoch_end` of a ModelCheckpoint), although the
# state is in the file and differs from a new loader's. With `max_steps` instead it is called in both
# cases. We expected it to be called always.
#
# Why it matters: a loader whose position runs on over epochs, such as one that streams tokens, goes
# back to its first sample at a resume after an epoch's end, and only then. The state of a
# LightningDataModule is restored in both cases, so that is where such a position has to be kept.
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
from lightning.pytorch.callbacks import ModelCheckpoint

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Loader(torch.utils.data.DataLoader):
    """Counts its batches, over epochs as well."""

    count, restored = 0, None

    def __iter__(self):
        for batch in super().__iter__():
            self.count += 1
            yield batch

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.restored = self.count = state["count"]


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, index):
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(checkpoint=None, **length):
    loader = Loader(torch.zeros(4, 1))
    often = ModelCheckpoint("kept", "{step}", every_n_train_steps=2, save_top_k=-1)
    ends = ModelCheckpoint("ends", "{step}", save_on_train_epoch_end=True, save_top_k=-1)
    quiet = dict(accelerator="cpu", logger=False, enable_progress_bar=False)
    quiet |= dict(enable_model_summary=False)
    trainer = Trainer(**length, callbacks=[often, ends], **quiet)
    trainer.fit(Model(), loader, ckpt_path=checkpoint, weights_only=False)
    return loader


fit(max_steps=4)
saved = {}
restored = {}
for file, moment in (("kept/step=2.ckpt", "middle"), ("ends/step=4.ckpt", "end")):
    loops = torch.load(file, weights_only=False)["loops"]["fit_loop"]["state_dict"]
    saved[moment] = loops["combined_loader"]
    lengths = {"epochs": {"max_epochs": 3}, "steps": {"max_steps": 6}}
    restored[moment] = {name: fit(file, **length).restored for name, length in lengths.items()}
print(f"lightning {lightning.__version__}, torch {torch.__version__}")
print(f"saved in the middle of an epoch: {saved['middle']}, at its end: {saved['end']}")
print(f"restored from the middle: {restored['middle']}, from the end: {restored['end']}")
assert saved == {"middle": [{"count": 2}], "end": [{"count": 4}]}, "the saved state has changed"
expected = {"middle": {"epochs": 2, "steps": 2}, "end": {"epochs": None, "steps": 4}}
assert restored == expected, "the behaviour has changed"
PYTHON
