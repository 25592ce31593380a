"""A process of `dhellam bench several`: `python -m lightning_dhellam.bench.several.process FOLDER`.

Started by torchrun, or alone for an emulated rank. FOLDER holds the job, and gets its result from
the first process, whole or not at all.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from lightning_dhellam.bench.processes import end_with_parent
from lightning_dhellam.bench.report import device_name
from lightning_dhellam.bench.several.job import JOB, MEGATRON, OURS, RESULT, Job
from lightning_dhellam.files import save_text
from lightning_dhellam.parallel.nccl import open_queues


def main(folder: Path) -> None:
    """Do the job in `folder`, and write its result there."""
    warnings.simplefilter("ignore")
    end_with_parent()
    job = Job.load(folder / JOB)
    device = torch.device(job.device)
    if job.side == OURS:
        open_queues()  # the strategy would be too late: the next lines start CUDA
    if job.device == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    result: dict[str, Any]
    if job.side == MEGATRON:
        from lightning_dhellam.bench.several.megatron import measure

        result = measure(job, device)
    else:
        from lightning_dhellam.bench.several.ours import measure as measure_ours

        result = measure_ours(job, device, folder)
    if int(os.environ.get("RANK", "0")) == 0:
        save_text(folder / RESULT, json.dumps({**result, "device": device_name(device)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
