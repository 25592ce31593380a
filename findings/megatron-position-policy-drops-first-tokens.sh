#!/usr/bin/env bash
# megatron-core 0.16.1 (and 0.19.2) with torch 2.13.0, seen 2026-11-30.
#
# `moe_token_drop_policy="position"` drops the tokens at the end of the batch that exceed an expert's
# capacity, says the documentation of TransformerConfig. It takes the largest of numbers that are all
# 1 by `torch.topk`, which promises no order: on a CPU the *first* tokens of an expert are dropped
# and the last ones kept. We expected the first ones to be kept.
#
# Why it matters: who chooses this policy wants that what is dropped depends on the place alone, so
# that a prefix is routed alike whatever follows it, as when text is generated. It is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q megatron-core==0.16.1 numpy
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping

tokens, capacity = 1024, 512
probs = torch.ones(tokens, 1)  # all tokens have chosen the one expert
_, kept = apply_router_token_dropping(
    probs, probs.bool(), router_topk=1, capacity_factor=capacity / tokens, drop_policy="position"
)
places = kept.flatten().nonzero().flatten().tolist()
print(f"megatron-core {version('megatron-core')}, torch {torch.__version__}")
print(f"capacity {capacity} of {tokens} tokens: kept are {places[0]} to {places[-1]}")
assert len(places) == capacity
assert places != list(range(capacity)), "the behaviour has changed"
PYTHON
