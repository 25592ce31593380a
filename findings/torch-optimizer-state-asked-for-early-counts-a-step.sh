#!/usr/bin/env bash
# torch 2.13.0, seen 2026-11-30.
#
# `torch.distributed.checkpoint.state_dict.get_optimizer_state_dict` gives an optimizer's state in a
# form for checkpoints. An optimizer that has not stepped yet has none, so it is stepped: with
# gradients of zero and a learning rate of zero, and what that leaves stays. The optimizer that was only
# asked then believes that a step is behind it: AdamW's first real step is its second, whose bias
# correction is another, and moves a weight by 0.74 of what it would have. The same optimizer, saved
# after its first step or never, is not touched. We expected asking to change nothing.
#
# Why it matters: a loop that saves step 0, or that asks for the state once to load into it and then
# finds nothing to load, trains to other weights than one that does not, and nothing says so. Ask
# after the first step, or make the optimizer anew.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import torch
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict


def first_step(asks: int) -> tuple[float, float]:
    """How far the first step moves a weight, and the steps that AdamW has counted after it."""
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
    before = model.weight.item()
    for _ in range(asks):
        get_optimizer_state_dict(model, optimizer)
    assert model.weight.item() == before
    model(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    return before - model.weight.item(), optimizer.state[model.weight]["step"].item()


print("torch", torch.__version__)
found = {asks: first_step(asks) for asks in (0, 1, 2)}
for asks, (moved, counted) in found.items():
    print(f"asked {asks} times before: the first step moves by {moved:.4f}, and is step {counted:.0f}")
assert abs(found[0][0] - 0.1) < 1e-5 and found[0][1] == 1, "the step without asking has changed"
changed = "the behaviour has changed"
assert found[1][1] == found[2][1] == 2, changed
assert abs(found[1][0] / found[0][0] - 0.744) < 0.002, changed
PYTHON
