#!/usr/bin/env bash
# torch 2.13.0, seen 2026-11-30.
#
# `Schedule1F1B.pipeline_order` says for each rank which forward and backward of which micro-batch come
# when. On the last rank its forwards are those of micro-batches 1 to M, where there are 0 to M-1: the
# count of forwards goes on from a warm-up that this rank does not have. All other ranks count from 0,
# and so do the last rank's own backwards. A step follows code of its own and is right. We expected the
# list to be what is carried out.
#
# Why it matters: whoever takes the list for the schedule (to simulate it, draw it, compare or replay
# it) has a backward of micro-batch 0 on the last stage whose forward never comes, and a forward of a
# micro-batch that does not exist; a check for completeness fails on torch's plainest schedule.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0
cd "$folder"
venv/bin/python -W ignore - <<'PYTHON'
import re

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

STAGES, MICRO_BATCHES = 2, 4
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
stage = PipelineStage(torch.nn.Linear(2, 2), STAGES - 1, STAGES, torch.device("cpu"))
schedule = Schedule1F1B(stage, MICRO_BATCHES, loss_fn=torch.nn.functional.mse_loss)
dist.destroy_process_group()

print(f"torch {torch.__version__}")
found = {}
for rank, actions in schedule.pipeline_order.items():
    shown = [str(action) for action in actions if action is not None]
    print(f"rank {rank}: {' '.join(shown)}")
    works = [match for word in shown if (match := re.fullmatch(r"\d+([FB])(\d+)", word))]
    found[rank] = {
        kind: sorted(int(work[2]) for work in works if work[1] == kind) for kind in ("F", "B")
    }
every = list(range(MICRO_BATCHES))
assert found[0] == {"F": every, "B": every}, "the first rank has changed"
assert found[1]["B"] == every, "the last rank's backwards have changed"
assert found[1]["F"] == [k + 1 for k in every], "the behaviour has changed"
PYTHON
