#!/usr/bin/env bash
# lightning 2.6.6 with torch 2.13.0, seen 2026-11-30.
#
# A training loader that is any iterable with `state_dict` and `load_state_dict` has its state put
# into checkpoints. If it has a length, a run that is saved after step 4 and resumed goes on with
# batch 4. If it has none, the same run goes on with batch 5: Lightning fetches one batch ahead of
# loaders whose end it cannot know, asks the loader for its state with that batch fetched, and does
# not keep the batch. We expected the state that belongs to what was trained on, as with a length.
#
# Why it matters: streams of tokens have no length. Each resume skips a batch, and no message says so.
# A loader can tell fetched batches from trained ones only by hooks of its module.
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

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Stream:
    """Numbers 0, 1, 2, …, from where its state says."""

    def __init__(self):
        self.next = 0

    def __iter__(self):
        while self.next < 12:
            self.next += 1
            yield torch.full((1, 1), float(self.next - 1))

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


class Sized(Stream):
    def __len__(self):
        return 12


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.seen = []

    def training_step(self, batch, index):
        self.seen.append(int(batch))
        return self.layer(batch).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def trained(kind, steps, ckpt=None):
    model = Model()
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(model, kind(), ckpt_path=ckpt)
    return trainer, model.seen


print(f"lightning {lightning.__version__}, torch {torch.__version__}")
found = {}
for kind in (Sized, Stream):
    trainer, before = trained(kind, 4)
    trainer.save_checkpoint("saved.ckpt")
    _, after = trained(kind, 7, "saved.ckpt")
    found[kind.__name__] = before, after
    print(f"{kind.__name__:6} trained on {before}, and after resuming on {after}")
assert found["Sized"] == ([0, 1, 2, 3], [4, 5, 6]), "the behaviour with a length has changed"
assert found["Stream"] == ([0, 1, 2, 3], [5, 6, 7]), "the behaviour without one has changed"
PYTHON
