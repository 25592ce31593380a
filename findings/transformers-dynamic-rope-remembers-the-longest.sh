#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0, seen 2026-11-30.
#
# Dynamic rotary scaling (`rope_type: dynamic`) stretches the frequencies by the length of the
# sequence, once that is beyond `max_position_embeddings`. The model keeps the longest that it has seen:
# a sequence of 48 tokens has other logits after one of 128 was evaluated than before, and those of
# before again once a short one, of 16, has come between. Nothing is cached on purpose: `use_cache` is
# off, and the model in evaluation mode. We expected logits to follow from the tokens alone.
#
# Why it matters: an evaluation's losses depend on the order of its texts, a served answer on who asked
# before, and two ports cannot be compared by any but the first sequence. Evaluate each length in a
# fresh model, or a short sequence in between.
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
from transformers import LlamaConfig, LlamaForCausalLM

config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=32,
    initializer_range=0.2,
    rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
)
torch.manual_seed(0)
model = LlamaForCausalLM(config).eval()
short, middle, long = (torch.randint(64, (1, length)) for length in (16, 48, 128))


@torch.no_grad()
def logits(tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, use_cache=False).logits


first, again = logits(middle), logits(middle)
logits(long)
after_long = logits(middle)
logits(short)
after_short = logits(middle)
far = (after_long - first).abs().max().item()
print(f"transformers {version('transformers')}, torch {torch.__version__}")
print(f"48 tokens twice: {torch.equal(first, again)}; after 128: off by up to {far:.3f} of"
      f" {first.abs().max().item():.3f}; after 16: {torch.equal(first, after_short)}")
assert torch.equal(first, again)
changed = "the behaviour has changed"
assert far > 0.01 and torch.equal(first, after_short), changed
PYTHON
