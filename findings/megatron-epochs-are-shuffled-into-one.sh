#!/usr/bin/env bash
# megatron-core 0.16.1 with torch 2.13.0, seen 2026-11-30.
#
# A GPTDataset that is asked for more samples than its text has goes through the text several times.
# Two whole epochs are not one after the other: documents of both are shuffled together. After the
# first half of 1,000 documents taken twice about 250 have come twice, and about 250 not at all. Only a
# last epoch of which less than 80% is wanted stands apart: with 1.7 epochs every document comes once
# before any comes again. We expected epoch after epoch in either case.
#
# Why it matters: whoever trains a round number of epochs sees a quarter of the text late and another
# quarter twice before that, so that a run that is ended at half its samples has not seen all of the
# text, and its curve differs from one that was planned for one epoch. Ask for one epoch at a time
# where that matters.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q megatron-core==0.16.1 numpy
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import logging
from collections import Counter
from importlib.metadata import version

import numpy
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

logging.disable(logging.WARNING)
DOCUMENTS, LENGTH = 1000, 8


class Tokenizer:
    vocab_size, eod, pad, unique_identifiers = DOCUMENTS + 2, 0, 1, {}


builder = IndexedDatasetBuilder("text.bin", dtype=numpy.uint16)
for number in range(DOCUMENTS):  # each is a sample, all of whose tokens are its number
    builder.add_document(torch.full((LENGTH,), number + 2), [LENGTH])
builder.finalize("text.idx")


def times_of_each(samples: int) -> Counter[int]:
    """How many documents come how often in the first DOCUMENTS samples of so many."""
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=LENGTH,
        blend=(["text"], None),
        split="1,0,0",
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
        add_extra_token_to_sequence=False,
        path_to_cache=f"cache {samples}",
    )
    made = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config)
    data = made.build()[0]
    seen = Counter(int(data[index]["tokens"][0]) for index in range(DOCUMENTS))
    return Counter(seen[number + 2] for number in range(DOCUMENTS))


print(f"megatron-core {version('megatron-core')}, torch {torch.__version__}")
found = {samples: times_of_each(samples) for samples in (1000, 1700, 2000)}
for samples, counts in found.items():
    shown = ", ".join(f"{counts[n]} come {n} times" for n in sorted(counts))
    print(f"of {samples} samples the first {DOCUMENTS}: {shown}")
assert found[1000] == {1: DOCUMENTS}
changed = "the behaviour has changed"
assert found[1700] == {1: DOCUMENTS}, changed
assert 200 < found[2000][0] < 300 and 200 < found[2000][2] < 300, changed
PYTHON
