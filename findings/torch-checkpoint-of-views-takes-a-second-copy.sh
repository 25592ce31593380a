#!/usr/bin/env bash
# torch 2.13.0, seen 2026-11-30.
#
# torch's distributed checkpoint writes tensors one after the other into a file. A tensor that is a part
# of a larger storage is cloned first, and every clone is kept until the whole file is written: 64 views
# of one tensor of 256 MiB take another 256 MiB at the peak. 64 tensors of the same size with storages
# of their own take nothing. We expected a clone to live for as long as it is written.
#
# Why it matters: parameters and optimizer state of sharded optimizers are views of a flat buffer
# (Megatron-core's distributed optimizer, FSDP), so a save takes the memory of the host for a rank's
# whole share once more, just where it was chosen to write without a copy.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
cd "$folder"
cat > save.py <<'PYTHON'
import re
import sys

import torch
import torch.distributed.checkpoint as dcp

COUNT, SIZE = 64, 1 << 20


def peak() -> int:
    """Most memory that this process has had since it was asked to forget, in bytes."""
    with open("/proc/self/status") as status:
        return int(re.search(r"VmHWM:\s+(\d+)", status.read())[1]) << 10


def save(state: dict[str, torch.Tensor], to: str) -> None:
    dcp.save(state, storage_writer=dcp.FileSystemWriter(to, sync_files=False), no_dist=True)


parts = torch.ones(COUNT * SIZE).split(SIZE)
if sys.argv[1] == "whole":
    parts = [part.clone() for part in parts]
state = {f"part {index}": part for index, part in enumerate(parts)}
save({"small": torch.ones(4)}, f"{sys.argv[1]} first")  # loads what saving needs
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forget the peak
before = peak()
save(state, sys.argv[1])
print((peak() - before) >> 20)
PYTHON
views=$(venv/bin/python -W ignore save.py views)
whole=$(venv/bin/python -W ignore save.py whole)
venv/bin/python -c 'import torch; print("torch", torch.__version__)'
echo "256 MiB of views: the peak rose by $views MiB; of tensors of their own: by $whole MiB"
test "$whole" -lt 64 || { echo "tensors of their own have changed" >&2; exit 1; }
test "$views" -gt 192 || { echo "the behaviour has changed" >&2; exit 1; }
