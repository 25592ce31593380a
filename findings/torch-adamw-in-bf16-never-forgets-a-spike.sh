#!/usr/bin/env bash
# torch 2.13.0, seen 2026-11-30.
#
# AdamW keeps its averages in the type of the parameter. With bf16 parameters and betas of 0.9 and
# 0.999 the average of squared gradients can rise, but not fall: 0.999 of a number of 8 bits rounds to
# the number itself. One gradient of 10, then 5,000 of 0.01: in fp32 the average comes down from 0.1 to
# 0.0008, in bf16 it is 0.1 to the end, in all three implementations (for-loop, foreach, fused). Steps
# are then an eleventh of what they should be, for good. We expected a coarse average, not one that is
# stuck; with beta2=0.99 it comes down.
#
# Why it matters: training in pure bf16 (Lightning's `bf16-true`) survives one spike with a learning
# rate that never recovers, weight by weight, and the loss only looks slow. Keep master weights, or
# choose a beta2 of at most 0.99.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import torch

WAYS = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def average(dtype: torch.dtype, beta: float, **way: bool) -> tuple[float, float]:
    """AdamW's average of squares after a spike, and after 5,000 small gradients more."""
    weight = torch.nn.Parameter(torch.ones(4, dtype=dtype))
    optimizer = torch.optim.AdamW([weight], lr=1e-5, betas=(0.9, beta), **way)
    seen = []
    for gradient in [10.0] + [0.01] * 5000:
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()
        seen.append(optimizer.state[weight]["exp_avg_sq"][0].item())
    return seen[0], seen[-1]


print("torch", torch.__version__)
for name, way in WAYS.items():
    wide, narrow = average(torch.float32, 0.999, **way), average(torch.bfloat16, 0.999, **way)
    shorter = average(torch.bfloat16, 0.99, **way)
    print(
        f"{name:8} fp32 {wide[0]:.4f} -> {wide[1]:.6f}, bf16 {narrow[0]:.4f} -> {narrow[1]:.6f},"
        f" bf16 with beta2=0.99 {shorter[0]:.4f} -> {shorter[1]:.6f}"
    )
    assert wide[1] < 0.01 * wide[0], "fp32 has changed"
    assert narrow[1] == narrow[0], "the behaviour has changed"
    assert shorter[1] < 0.6 * shorter[0], "a smaller beta2 has changed"
PYTHON
