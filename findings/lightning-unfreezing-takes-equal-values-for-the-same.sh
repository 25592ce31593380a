#!/usr/bin/env bash
# lightning 2.6.6 with torch 2.13.0, seen 2026-11-30.
#
# `BaseFinetuning.unfreeze_and_add_param_group` leaves out parameters that the optimizer has already,
# and finds them by their values: `torch.equal`. Two LayerNorms that no step has changed hold the same
# ones and zeros. Unfrozen one after the other, each at a learning rate of its own, the second one is
# taken for the first: it requires a gradient, is in no group, and is never trained. A warning says
# that it already exists in another group. We expected parameters to be told apart as objects.
#
# Why it matters: rates by depth are what gradual unfreezing is for, and the norms and biases of a
# model that starts from its initialisation are all alike.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q lightning==2.6.6
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import logging
import warnings

import lightning
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Model(LightningModule):
    def __init__(self):
        super().__init__()
        self.lower, self.upper = torch.nn.LayerNorm(4), torch.nn.LayerNorm(4)
        self.head = torch.nn.Linear(4, 1)

    def training_step(self, batch, index):
        return self.head(self.upper(self.lower(batch))).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


class Unfreezing(BaseFinetuning):
    def freeze_before_training(self, model):
        self.freeze([model.lower, model.upper])

    def finetune_function(self, model, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(model.upper, optimizer, lr=0.01)
            self.unfreeze_and_add_param_group(model.lower, optimizer, lr=0.001)


torch.manual_seed(0)
model = Model()
quiet = dict(accelerator="cpu", logger=False, enable_progress_bar=False)
quiet |= dict(enable_model_summary=False, enable_checkpointing=False)
trainer = Trainer(max_epochs=3, callbacks=[Unfreezing()], **quiet)
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    trainer.fit(model, torch.utils.data.DataLoader(torch.randn(32, 4), batch_size=8))
stepped = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
print(f"lightning {lightning.__version__}, torch {torch.__version__}")
found = {}
for name in ("lower", "upper"):
    layer = getattr(model, name)
    found[name] = id(layer.weight) in stepped
    moved = not torch.equal(layer.weight.detach(), torch.ones(4))
    wanted = layer.weight.requires_grad
    print(f"{name}: requires a gradient {wanted}, in a group {found[name]}, changed {moved}")
    assert wanted and moved == found[name]
assert any("already exist within another group" in str(one.message) for one in said)
assert found == {"lower": False, "upper": True}, "the behaviour has changed"
PYTHON
