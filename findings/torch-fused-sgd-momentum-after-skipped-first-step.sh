#!/usr/bin/env bash
# torch 2.13.0, seen 2026-11-30.
#
# A fused SGD with momentum under a gradient scaler, whose scale is too large for the first step, as
# is usual: the scaler leaves the step out, and lowers the scale. In the first step that is done the
# momentum should be the gradient. It is the gradient and 0.9 times whatever memory held before: the
# buffer is made in the step that is left out, and nothing writes to it. SGD that is not fused gives
# the gradient. We expected both to.
#
# Why it matters: weights move by numbers that have nothing to do with the loss, NaN among them, once,
# at the start of a run, and differently in each. Whoever leaves out the first step of a fused SGD,
# by a scaler or by `found_inf`, has to make its buffers first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import torch

SIZE = 4096


def after_one_step(fused: bool) -> tuple[int, torch.Tensor]:
    """Steps that were left out before one was done, and the weights after that one."""
    weight = torch.nn.Parameter(torch.zeros(SIZE))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    left_out = 0
    while True:
        used = [torch.full((SIZE,), 7.0) for _ in range(256)]
        optimizer.zero_grad()
        scaler.scale((4 * weight).sum()).backward()  # the gradient is 4
        del used  # memory that is given out again is not empty
        scaler.step(optimizer)
        before = scaler.get_scale()
        scaler.update()
        if scaler.get_scale() >= before:
            return left_out, weight.detach()
        left_out += 1


print(f"torch {torch.__version__}")
found = {fused: after_one_step(fused) for fused in (False, True)}
for fused, (left_out, weight) in found.items():
    right = int((weight == -4).sum())
    print(f"fused={fused}: {left_out} left out, then {right} of {SIZE} weights moved by the gradient")
assert found[False][0] == found[True][0] > 0, "the scaler has changed"
assert bool((found[False][1] == -4).all()), "SGD that is not fused has changed"
assert not bool((found[True][1] == -4).all()), "the behaviour has changed"
PYTHON
