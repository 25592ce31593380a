#!/usr/bin/env bash
# torch 2.13.0, seen 2026-11-30.
#
# `torch.nn.utils.clip_grad_norm_` takes the norm in the type of the gradients. Of fp16 gradients that
# are all finite the norm may be above 65,504 and so be infinite: the factor of clipping is then zero,
# and every gradient becomes zero instead of being clipped. 9,000 numbers of 700 do it. In bf16 the
# same norm is finite, but has 8 bits: of 5,000 ones it is 70.5, not 70.71. We expected a norm in fp32.
#
# Why it matters: gradients that are still multiplied by a loss scale, or of large models in pure fp16,
# pass through clipping as zeros; the optimizer steps on them, nothing is infinite afterwards, and no
# skipped step shows it unless `error_if_nonfinite` is set. Take the norm in fp32.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import torch
from torch.nn.utils import clip_grad_norm_


def clipped(dtype: torch.dtype, count: int, size: int, value: float, **way) -> tuple[float, float]:
    """The norm, and the largest gradient after clipping to a norm of 1."""
    weights = [torch.nn.Parameter(torch.zeros(size, dtype=dtype)) for _ in range(count)]
    for weight in weights:
        weight.grad = torch.full_like(weight, value)
    norm = clip_grad_norm_(weights, 1.0, **way).item()
    return norm, max(weight.grad.abs().max().item() for weight in weights)


print("torch", torch.__version__)
for foreach in (False, True):
    found = {
        name: clipped(getattr(torch, name), 9, 1000, 700.0, foreach=foreach)
        for name in ("float32", "float16")
    }
    for name, (norm, most) in found.items():
        print(f"foreach={foreach}, {name}: norm {norm:.0f}, largest gradient clipped {most:.6f}")
    norm, _ = clipped(torch.bfloat16, 5000, 1, 1.0, foreach=foreach)
    print(f"foreach={foreach}, bfloat16: norm of 5,000 ones {norm}")
    assert abs(found["float32"][0] - 66408) < 1 and abs(found["float32"][1] - 0.010541) < 1e-5
    changed = "the behaviour has changed"
    assert found["float16"] == (float("inf"), 0.0), changed
    assert norm == 70.5, changed
PYTHON
