#!/usr/bin/env bash
# transformers 5.23.0 with torch 2.13.0, seen 2026-11-30.
#
# Documents may be flattened into one row whose `position_ids` restart with each of them, and no
# `attention_mask`: then attention does not cross documents, as if each stood alone. A causal model
# in training mode does that only with `use_cache=False`. With `use_cache` left at its default the
# same row gives another loss: documents attend to those before them, and nothing says so, although
# the cache is new and nobody asked for one. We expected the cache to change no number.
#
# Why it matters: batches of `DataCollatorWithFlattening` look like this, and a plain training loop
# leaves `use_cache` alone. Trainers that switch it off, with checkpointing for one, are not touched,
# so a loss may differ between two that do the same otherwise.
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

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=32,
    initializer_range=0.3,
)
model = LlamaForCausalLM(config).train()
documents = [torch.randint(50, (1, length)) for length in (7, 9)]
row = torch.cat(documents, dim=1)
positions = torch.cat([torch.arange(document.shape[1]) for document in documents])[None]


def second(**options):
    """Logits of the second document in the flattened row."""
    with torch.no_grad():
        return model(row, position_ids=positions, **options).logits[:, 7:]


with torch.no_grad():
    alone = model(documents[1]).logits
apart, joined = second(use_cache=False), second()
print(f"transformers {version('transformers')}, torch {torch.__version__}")
print(f"largest difference to the document alone, without a cache: {(apart - alone).abs().max():.1e}")
print(f"by default: {(joined - alone).abs().max():.1e}, of logits up to {alone.abs().max():.1f}")
assert torch.allclose(apart, alone, atol=1e-4), "documents are no longer apart without a cache"
assert not torch.allclose(joined, alone, atol=1e-1), "the behaviour has changed"
PYTHON
