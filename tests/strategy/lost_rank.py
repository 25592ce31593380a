"""A job of ranks of which one is killed in the middle of a step."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.process_groups import is_running

ROOT = Path(__file__).resolve().parents[2]


def torchrun(world: int) -> tuple[str, ...]:
    """What starts a job of so many ranks."""
    return ("-m", "torch.distributed.run", f"--nproc-per-node={world}")


TORCHRUN = torchrun(2)
TIMEOUTS = {"cpu": 240, "gpu": 20}
"""Seconds after which a collective that a rank does not join fails, and the start of the job as
well. Without GPUs a lost connection is noticed at once, and the processes of a busy host may start
far apart."""

SCRIPT = """
import os, signal, sys
from datetime import timedelta
from lightning.pytorch import Callback
from torch.utils.data import DataLoader
from tests.strategy.runs import Model, Sequences, make_trainer

victim, accelerator, timeout, world = int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])

class Killed(Callback):
    def on_before_optimizer_step(self, trainer, *_):
        if trainer.global_step == 2 and trainer.global_rank == victim:
            print(f"rank {victim} is killed", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    strategy = {"tensor_parallel_size": 2, "pipeline_parallel_size": world // 2}
    strategy["timeout"] = timedelta(seconds=timeout)
    options = {"accelerator": accelerator, "devices": world, "max_steps": 100}
    trainer = make_trainer(strategy, [Killed()], **options)
    trainer.fit(Model(), DataLoader(Sequences(800), batch_size=8))
"""


def environment() -> dict[str, str]:
    """Of a job that this process is no rank of."""
    ours = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    paths = os.pathsep.join([str(ROOT), *filter(None, [clean.get("PYTHONPATH")])])
    return {**clean, "PYTHONPATH": paths, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def lose(
    victim: int, folder: Path, accelerator: str, *launcher: str, world: int = 2
) -> tuple[str, int]:
    """Output and exit code of the job; the processes that it started have ended by themselves."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    timeout = TIMEOUTS[accelerator]
    job = subprocess.Popen(
        [
            sys.executable,
            *launcher,
            str(script),
            str(victim),
            accelerator,
            str(timeout),
            str(world),
        ],
        env=environment(),
        stdout=(folder / "output").open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        code = job.wait(timeout=900)
        # The first process of a job may end before those that it has started.
        alone = _ends(job.pid, seconds=4 * timeout)
        output = (folder / "output").read_text()
        assert alone, f"a process of the job goes on without the others: {output}"
        return output, code
    finally:
        if is_running(job.pid):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def _ends(group: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_running(group) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not is_running(group)
