#!/usr/bin/env bash
# torch 2.13.0, seen 2026-11-30.
#
# `torchrun --max-restarts` starts all workers again after one has failed. The new ones meet by
# `env://` in the very store that the failed ones had: a key that life 0 has set is there in life 1.
# Nothing of the attempt is put before the keys. We expected each life to begin with an empty store.
#
# Why it matters: what workers tell each other through the store, the addresses of gloo's connections
# among it, may be those of processes that are dead. A restarted job with gloo groups then meets
# refused connections, or waits, and not every time. Whoever makes groups after a restart, or keeps
# keys of his own there, has to put the number of the restart (`TORCHELASTIC_RESTART_COUNT`) before
# them.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
cat > worker.py <<'PYTHON'
import os
import sys

import torch
import torch.distributed as dist

life, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
store, _, _ = next(dist.rendezvous("env://"))
if rank == 0:
    finds = "finds" if store.check(["left by life 0"]) else "does not find"
    print(f"torch {torch.__version__}, life {life}: {finds} a key of life 0", flush=True)
if life == 0:
    if rank == 0:
        store.set("left by life 0", "here")
    store.wait(["left by life 0"])
    sys.exit(1)
PYTHON
export OMP_NUM_THREADS=1
venv/bin/python -W ignore -m torch.distributed.run --standalone --nproc-per-node=2 --max-restarts=1 \
  worker.py 2> errors | tee output || { cat errors >&2; exit 1; }
grep -q "life 0: does not find" output || { echo "life 0 has changed" >&2; exit 1; }
grep -q "life 1: finds" output || { echo "the behaviour has changed" >&2; exit 1; }
