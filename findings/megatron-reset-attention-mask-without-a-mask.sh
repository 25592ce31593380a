#!/usr/bin/env bash
# megatron-core 0.16.1 with torch 2.13.0, seen 2026-11-30.
#
# A GPTDataset packs documents into samples. With `reset_attention_mask=True` no token attends to
# the documents before its own. With `create_attention_mask=False` as well, which is what one sets
# for kernels that make their causal masks themselves, a sample has no mask, nothing else says
# where its documents end (with `reset_position_ids=False` nothing at all does), and there is no
# error and no warning. We expected the two settings to be refused together, or boundaries of
# documents in the sample, as kernels for packed sequences take them.
#
# Why it matters: the fast kernels are the reason to leave the mask out, and a run that asked for
# separate documents then trains across them without a word. Who leaves the mask out has to take the
# boundaries from position ids (`reset_position_ids=True`) and hand them to the kernel himself.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q megatron-core==0.16.1 numpy
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import logging
from importlib.metadata import version

import numpy
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

logging.disable(logging.WARNING)


class Tokenizer:
    vocab_size, eod, pad, unique_identifiers = 100, 0, 1, {}


def sample(**settings):
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=32,
        blend=(["text"], None),
        split="1,0,0",
        tokenizer=Tokenizer(),
        reset_attention_mask=True,
        eod_mask_loss=False,
        path_to_cache="cache",
        **settings,
    )
    return BlendedMegatronDatasetBuilder(GPTDataset, [4, 0, 0], lambda: True, config).build()[0][0]


builder = IndexedDatasetBuilder("text.bin", dtype=numpy.uint16)
for length in (5, 6, 7, 8) * 8:
    document = torch.tensor([*range(10, 10 + length), Tokenizer.eod])
    builder.add_document(document, [len(document)])
builder.finalize("text.idx")

masked = sample(reset_position_ids=False, create_attention_mask=True)
seen = (~masked["attention_mask"][0]).sum(dim=1).tolist()
plain = sample(reset_position_ids=False, create_attention_mask=False)
positions = sample(reset_position_ids=True, create_attention_mask=False)["position_ids"].tolist()
print(f"megatron-core {version('megatron-core')}, torch {torch.__version__}")
print(f"tokens that each one sees, with a mask: {seen}")
print(f"without one, a sample has: {', '.join(plain)}")
print(f"positions without one: {plain['position_ids'].tolist()}")
print(f"positions without one, reset: {positions}")
assert max(seen) < 32 and seen == [position + 1 for position in positions]
changed = "the behaviour has changed"
assert list(plain) == ["tokens", "labels", "loss_mask", "position_ids"], changed
assert plain["position_ids"].tolist() == list(range(32)), changed
PYTHON
