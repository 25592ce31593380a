"""A process of `dhellam bench several`: `python -m lightning_dhellam.bench.several.process FOLDER`.

Started by torchrun, or alone for an emulated rank. FOLDER holds the job, and gets its result from
the first process: what is measured so far, after each row.
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
    if job.side != MEGATRON:
        open_queues()  # the strategy would be too late: the next lines start CUDA
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

    if job.side == MEGATRON:
        from lightning_dhellam.bench.several.megatron import measure

        measure(job, device, note)
    elif job.side == OURS:
        from lightning_dhellam.bench.several.ours import measure as measure_plans

        note(measure_plans(job, device, folder))
    else:
        from lightning_dhellam.bench.several.scheduled import measure as measure_schedules

        measure_schedules(job, device, note)
    save(is_whole=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
