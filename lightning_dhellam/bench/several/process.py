"""A process of `dhellam bench several`, started with the folder of its job and who trains it.

By torchrun, or alone for an emulated rank. It imports all that it needs, then waits until the
folder holds the job, so that what trains before it meets no import. The folder gets the result from
the first process: what is measured so far, after each row.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from lightning_dhellam.bench.processes import end_with_parent
from lightning_dhellam.bench.report import device_name
from lightning_dhellam.bench.several.job import JOB, MEGATRON, RESULT, Job
from lightning_dhellam.files import save_text
from lightning_dhellam.importing import uncollected
from lightning_dhellam.parallel.nccl import open_queues

_POLL = 0.05
"""Seconds between two looks for the job."""


def main(folder: Path, side: str) -> None:
    """Do the job that will be in `folder`, and write its result there."""
    warnings.simplefilter("ignore")
    end_with_parent()
    if side == MEGATRON:
        with uncollected():
            from lightning_dhellam.bench.several.megatron import measure
    else:
        open_queues()  # before anything starts CUDA
        with uncollected():
            from lightning_dhellam.bench.several.ours import measure
    while not (folder / JOB).exists():
        time.sleep(_POLL)
    job = Job.load(folder / JOB)
    device = torch.device(job.device)
    if job.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    measured: list[dict[str, Any]] = []

    def save(*, is_whole: bool) -> None:
        if int(os.environ.get("RANK", "0")) == 0:
            found = {"device": device_name(device), "whole": is_whole, "measured": measured}
            save_text(folder / RESULT, json.dumps(found))

    def note(row: dict[str, Any]) -> None:
        measured.append(row)
        save(is_whole=False)

    measure(job, device, note, folder)
    save(is_whole=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
