#!/usr/bin/env bash
# megatron-core 0.16.1 (and 0.19.2) with torch 2.13.0, seen 2026-11-30.
#
# `moe_router_load_balancing_type="global_aux_loss"`: with R data-parallel replicas its gradient is
# that of 1/R of `moe_aux_loss_coeff`. Each rank's loss is a sum over its own tokens, divided by the
# tokens of all replicas, so that the sum over replicas is the loss, which is also what is logged; but
# gradients of replicas are averaged. We expected the gradient of the loss that is logged, as
# `aux_loss` gives it: here the replicas have equal tokens, so that both losses are the same number.
#
# Why it matters: whoever tunes the coefficient on one replica, or changes the number of replicas,
# trains with another coefficient than he gave, 1/64 of it with 64 replicas, and the log of the loss
# says nothing of it: experts collapse that were balanced before.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
"$folder/venv/bin/pip" install -q megatron-core==0.16.1 numpy
cd "$folder"
cat > run.py <<'PYTHON'
import sys
from importlib.metadata import version
from types import SimpleNamespace

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

rank, world = int(sys.argv[1]), int(sys.argv[2])
store = dist.FileStore(f"store-{world}", world)
dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
torch.cuda.current_device = lambda: torch.device("cpu")  # where the router puts its counts
own = [dist.new_group([each]) for each in range(world)][rank]
groups = SimpleNamespace(tp=own, cp=own, tp_cp=own, tp_dp_cp=dist.group.WORLD)
norms = {}
for kind in ("aux_loss", "global_aux_loss"):
    config = TransformerConfig(
        num_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        num_moe_experts=4,
        moe_ffn_hidden_size=8,
        moe_router_load_balancing_type=kind,
        moe_aux_loss_coeff=1.0,
    )
    router = TopKRouter(config, groups)
    generator = torch.Generator().manual_seed(0)  # the same tokens on every replica
    logits = torch.randn(6, 2, 4, generator=generator, requires_grad=True)
    probs, _ = router.routing(logits)
    (0 * probs).sum().backward()  # what is left is the gradient of the loss of balance
    dist.all_reduce(logits.grad)
    norms[kind] = (logits.grad / world).norm().item()  # data parallelism takes the mean
if rank == 0:
    print(f"megatron-core {version('megatron-core')}, torch {torch.__version__}, replicas: {world}")
    for kind, norm in norms.items():
        print(f"  {kind}: norm of the gradient by logits {norm:.6f}")
    ratio = norms["global_aux_loss"] / norms["aux_loss"]
    assert abs(ratio - 1 / world) < 1e-4, "the behaviour has changed"
dist.destroy_process_group()
PYTHON
venv/bin/python -W ignore run.py 0 1
venv/bin/python -W ignore run.py 1 2 &
venv/bin/python -W ignore run.py 0 2
wait
