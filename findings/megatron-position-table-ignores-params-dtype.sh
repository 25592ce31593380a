#!/usr/bin/env bash
# megatron-core 0.16.1 with torch 2.13.0, seen 2026-11-30.
#
# With `params_dtype=torch.bfloat16` all weights of a model are in bf16, but for the table of learned
# positions (`position_embedding_type="learned_absolute"`): LanguageModelEmbedding makes it as a plain
# torch Embedding, which is in fp32 and on the CPU whatever the configuration says. We expected one
# type and one device.
#
# Why it matters: without a wrapper that converts the module afterwards the sum of words and positions
# is in fp32 from the first layer on, which costs twice the memory, or fails on a GPU; and a
# checkpoint of such a model has a tensor of another type than all others.
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
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.transformer import TransformerConfig

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
config = TransformerConfig(
    num_layers=1,
    hidden_size=8,
    num_attention_heads=2,
    use_cpu_initialization=True,
    params_dtype=torch.bfloat16,
    bf16=True,
)
embedding = LanguageModelEmbedding(
    config, vocab_size=16, max_sequence_length=4, position_embedding_type="learned_absolute"
)
types = {name: parameter.dtype for name, parameter in embedding.named_parameters()}
print(f"megatron-core {version('megatron-core')}, torch {torch.__version__}")
print(f"asked for {config.params_dtype}: {types}")
assert types["word_embeddings.weight"] is torch.bfloat16
assert types["position_embeddings.weight"] is torch.float32, "the behaviour has changed"
PYTHON
