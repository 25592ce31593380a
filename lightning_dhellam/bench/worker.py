"""The process of one side of the throughput benchmark: a job on stdin, its result in a file."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM  # noqa: F401  imported before the job comes, not timed

from lightning_dhellam.bench.report import device_name, pick_device
from lightning_dhellam.bench.sides import Shape, Side, measure
from lightning_dhellam.bench.workers import end_with_parent
from lightning_dhellam.files import save_text


def main() -> int:
    """Wait for one job and do it. Returns the exit code."""
    end_with_parent()
    line = sys.stdin.readline()
    if not line:
        return 0
    job = json.loads(line)
    result = {**_result(job), "device": device_name(pick_device(job["device"]))}
    save_text(Path(job["result"]), json.dumps(result))
    return 0


def _result(job: dict[str, Any]) -> dict[str, Any]:
    try:
        side = Side(job["side"], job["device"], job["plan"], job["operators"])
        return measure(Shape.parse(job["case"]), side, job["warm_up"], job["steps"])
    except torch.OutOfMemoryError as error:
        print(error, flush=True)
        return {"failed": "out of memory"}
    except Exception as error:
        traceback.print_exc()
        first = str(error).splitlines()[0] if str(error) else ""
        return {"failed": f"{type(error).__name__}: {first}"}


if __name__ == "__main__":
    sys.exit(main())
