#!/usr/bin/env bash
# megatron-core 0.16.1 with torch 2.13.0, seen 2026-11-29.
#
# A `ColumnParallelLinear` whose weight is frozen and whose bias is to be trained: the bias gets no
# gradient at all (`bias.grad` is None after backward), and nothing is said. A `RowParallelLinear` in
# the same state gives its bias the right gradient. We expected both to.
#
# Why it matters: whoever trains biases alone (as BitFit does, arXiv 2106.10199), or adapters and
# biases over a frozen base, trains half of the biases: those of the query-key-value and of the
# first MLP projection stay as they were, and an optimizer skips a gradient that is None silently.
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
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
options = dict(
    config=ModelParallelConfig(use_cpu_initialization=True, params_dtype=torch.float32),
    init_method=torch.nn.init.ones_,
    bias=True,
    skip_bias_add=False,
)
kinds = {
    "column": lambda: ColumnParallelLinear(4, 6, gather_output=False, **options),
    "row": lambda: RowParallelLinear(4, 6, input_is_parallel=True, **options),
}
found = {}
for kind, make in kinds.items():
    for state in ("trained", "frozen"):
        layer = make()
        layer.weight.requires_grad_(state == "trained")
        output, _ = layer(torch.ones(3, 2, 4, requires_grad=True))  # 3 positions, 2 samples
        output.sum().backward()
        found[kind, state] = None if layer.bias.grad is None else layer.bias.grad.tolist()
print(f"megatron-core {version('megatron-core')}, torch {torch.__version__}")
for (kind, state), gradient in found.items():
    print(f"{kind}-parallel, weight {state}: gradient of the bias {gradient}")
right = [6.0] * 6  # a bias is added at 3 x 2 places
assert found["row", "frozen"] == found["row", "trained"] == found["column", "trained"] == right
assert found["column", "frozen"] is None, "the behaviour has changed"
PYTHON
