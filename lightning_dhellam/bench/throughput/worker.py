"""The process of one side of the throughput benchmark: a job on stdin, its result in a file."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM  # noqa: F401  imported before the job comes, not timed

from lightning_dhellam.bench.processes import end_with_parent
from lightning_dhellam.bench.report import device_name, pick_device
from lightning_dhellam.bench.throughput.settings import Job
from lightning_dhellam.bench.throughput.sides import Tell, measure
from lightning_dhellam.bench.throughput.workers import stage_of
from lightning_dhellam.files import save_text


def main() -> int:
    """Wait for one job and do it. Returns the exit code."""
    end_with_parent()
    line = sys.stdin.readline()
    if not line:
        return 0
    message = json.loads(line)
    job, file = Job(**message["job"]), Path(message["result"])
    found = result_of(job, lambda stage: save_text(stage_of(file), stage))
    save_text(file, json.dumps({**found, "device": device_name(pick_device(job.device))}))
    return 0


def result_of(job: Job, tell: Tell = print) -> dict[str, Any]:
    """What the job has measured, or `failed` with the reason."""
    try:
        return measure(job, tell)
    except torch.OutOfMemoryError as error:
        print(error, flush=True)
        return {"failed": "out of memory"}
    except Exception as error:
        traceback.print_exc()
        first = str(error).splitlines()[0] if str(error) else ""
        return {"failed": f"{type(error).__name__}: {first}"}


if __name__ == "__main__":
    sys.exit(main())
