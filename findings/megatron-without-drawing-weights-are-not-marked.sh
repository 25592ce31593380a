#!/usr/bin/env bash
# megatron-core 0.16.1 with torch 2.13.0, seen 2026-11-30.
#
# `TransformerConfig(perform_initialization=False)` leaves weights as they are allocated, for those
# who load others over them. It also leaves out the marks that say how tensor-parallel ranks share a
# weight (`tensor_model_parallel`, `partition_dim`, `partition_stride`): the function that draws a
# weight sets them too. We expected the marks whether or not anything is drawn.
#
# Why it matters: by these marks a gradient norm counts a shared weight on every rank and any other
# on one, and checkpoints cut weights. Of a model built like that the norm is too small with tensor
# parallelism, clipping is wrong, and nothing says so.
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
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer import TransformerConfig

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()


def marks(drawn):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        use_cpu_initialization=True,
        perform_initialization=drawn,
    )
    layer = ColumnParallelLinear(
        8, 8, config=config, init_method=config.init_method, bias=False, skip_bias_add=True
    )
    names = ("tensor_model_parallel", "partition_dim", "partition_stride")
    return {name: getattr(layer.weight, name) for name in names if hasattr(layer.weight, name)}


print(f"megatron-core {version('megatron-core')}, torch {torch.__version__}")
print(f"marks of a weight that is drawn: {marks(True)}")
print(f"of one that is not: {marks(False)}")
assert marks(True).get("tensor_model_parallel") is True
assert marks(False) == {}, "the behaviour has changed"
PYTHON
