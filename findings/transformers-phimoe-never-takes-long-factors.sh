#!/usr/bin/env bash
# transformers 5.23.0 (with torch 2.13.0), seen 2026-11-30.
#
# Phi-3.5-MoE's configuration has two lists of rotary factors: `short_factor` for sequences up to
# `original_max_position_embeddings` and `long_factor` for longer ones, each with a magnitude of its
# own (`short_mscale`, `long_mscale`). transformers' PhimoeRotaryEmbedding takes the long magnitude
# for a longer sequence, but goes on with the short factors: it asks for frequencies without saying
# how long the sequence is. Phi-3, with the same lists, changes both.
#
# Why it matters: beyond 4,096 tokens the frequencies are not those that the checkpoint was trained
# with, and whoever compares a port with transformers at long lengths finds his own right one wrong.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.23.0
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from transformers import Phi3Config, PhimoeConfig
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding
from transformers.models.phimoe.modeling_phimoe import PhimoeRotaryEmbedding

ORIGINAL, LONG, POSITION = 16, 64, 3
factors = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "original_max_position_embeddings": ORIGINAL,
}
shape = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
    "max_position_embeddings": LONG,
    "pad_token_id": 0,
}
of_phimoe = PhimoeConfig(
    **shape, rope_parameters={**factors, "short_mscale": 1.0, "long_mscale": 1.5}
)
of_phi3 = Phi3Config(
    **shape, original_max_position_embeddings=ORIGINAL, rope_parameters=dict(factors)
)


def angle(rotary, length):
    """The angle of the fastest frequency at one position, in a sequence of this length."""
    positions = torch.arange(length)[None]
    cos, sin = rotary(torch.zeros(1, length, 16), positions)
    angle = torch.atan2(sin[0, POSITION, 0], cos[0, POSITION, 0]).item()
    return angle, torch.hypot(cos, sin)[0, POSITION, 0].item()


print(f"transformers {version('transformers')}, torch {version('torch')}")
found = {}
for name, rotary in (
    ("Phi-3.5-MoE", PhimoeRotaryEmbedding(of_phimoe)),
    ("Phi-3", Phi3RotaryEmbedding(of_phi3)),
):
    for length in (ORIGINAL, LONG):
        found[name, length] = angle(rotary, length)
        print(f"{name}, {length} tokens: angle %.2f, magnitude %.2f" % found[name, length])
print(f"position {POSITION} with a factor of 1: {POSITION / 1:.2f}; of 2: {POSITION / 2:.2f}")
assert abs(found["Phi-3", LONG][0] - POSITION / 2) < 1e-3, "Phi-3 takes the long factors"
assert abs(found["Phi-3.5-MoE", LONG][1] - 1.5) < 1e-3, "the magnitude is the long one"
assert abs(found["Phi-3.5-MoE", LONG][0] - POSITION) < 1e-3, "it takes the long factors now"
print("SEEN: the long magnitude with the short factors")
PYTHON
