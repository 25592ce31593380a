"""How the processes of a job are started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from lightning_dhellam.bench.processes import of_this
from lightning_dhellam.bench.several.job import LOG, MEGATRON, Job

_PROCESS = "lightning_dhellam.bench.several.process"
_TORCHRUN = "lightning_dhellam.bench.torchrun"
_APEX = Path(__file__).with_name("apex")
"""Has the GEMM that Megatron-core wants of Apex: without it, it would be slower than its users."""


def start(job: Job, folder: Path) -> subprocess.Popen[Any]:
    """Start the processes of a job, in a session of their own. They wait for it in `folder`."""
    with (folder / LOG).open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", *modules(job), str(folder), job.side],
            env=_environment(job),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def modules(job: Job) -> list[str]:
    """What Python runs for a job: its process, or torchrun that starts several of them."""
    if job.processes == 1:
        return [_PROCESS]
    return [_TORCHRUN, "--standalone", f"--nproc-per-node={job.processes}", "-m", _PROCESS]


def _environment(job: Job) -> dict[str, str]:
    """The environment of a job: for Megatron-core what it asks for."""
    environment = os.environ | of_this()
    if job.side == MEGATRON:
        # What its overlap relies on, as its documentation says.
        environment["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
        paths = [str(_APEX), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    if job.tp_overlap:
        environment["UB_SKIPMC"] = "1"  # transformer-engine's buffers without NVLink multicast
    return environment
