#!/usr/bin/env bash
# transformers 5.23.0, seen 2026-11-30.
#
# Version 5 of transformers says in `rope_parameters` what version 4 said in `rope_scaling`, and reads
# both. Where a configuration has both, as one does that is to serve both versions, the older field is
# taken and the newer one is dropped, whole and without a word: an `attention_factor` that stands in
# `rope_parameters` alone is lost. We expected the newer field to win, or the two to be joined.
#
# Why it matters: the attention factor of YaRN multiplies queries and keys. Without the model's own
# the library computes another from `factor`, and a checkpoint answers differently, in no visible way,
# than with a file that has the newer field alone.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q transformers==5.23.0
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
from importlib.metadata import version

from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

older = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
newer = {**older, "rope_theta": 10000.0, "attention_factor": 1.25}
given = {"newer alone": {"rope_parameters": newer}}
given["both"] = {"rope_scaling": older, "rope_parameters": newer}
print(f"transformers {version('transformers')}")
factors = {}
for name, fields in given.items():
    config = LlamaConfig(max_position_embeddings=64, **fields)
    factors[name] = LlamaRotaryEmbedding(config).attention_scaling
    print(f"{name}: attention factor {factors[name]:.4f}, {config.rope_parameters}")
assert factors["newer alone"] == 1.25, "the newer field has changed"
assert factors["both"] != 1.25, "the behaviour has changed"
PYTHON
