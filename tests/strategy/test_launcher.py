"""Scripts that Lightning's own launcher starts again for every rank."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import pytest

from lightning_dhellam.strategy.termination import PARENT, watch_parent
from tests.ranks import run_ranks
from tests.strategy.lost_rank import TORCHRUN, environment, lose

SCRIPT = """
import json, os, sys
from pathlib import Path
from torch.utils.data import DataLoader
from tests.strategy.runs import Losses, Model, Sequences, make_trainer

if __name__ == "__main__":
    folder, heads = Path(sys.argv[1]), int(sys.argv[2])
    (folder / f"process-{os.getpid()}").touch()
    losses = Losses()
    strategy = {"tensor_parallel_size": 2, "micro_batch_size": 3}
    trainer = make_trainer(strategy, [losses], devices=2, max_steps=4)
    module = Model(num_attention_heads=heads, num_query_groups=heads // 2, head_dim=4)
    trainer.fit(module, DataLoader(Sequences(), batch_size=8))
    (folder / f"losses-{trainer.global_rank}").write_text(json.dumps(losses.values))
"""


def _run(folder: Path, heads: int) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    return subprocess.run(
        [sys.executable, str(script), str(folder), str(heads)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_two_ranks_are_started_and_train_together(tmp_path: Path) -> None:
    done = _run(tmp_path, heads=4)
    assert done.returncode == 0, done.stderr
    assert "Apex" not in done.stderr, "Megatron warns of what is not needed"
    assert len(list(tmp_path.glob("process-*"))) == 2
    first, second = (json.loads((tmp_path / f"losses-{rank}").read_text()) for rank in (0, 1))
    assert first == second and len(first) == 4


def test_a_wrong_configuration_is_reported_once_and_starts_no_process(tmp_path: Path) -> None:
    done = _run(tmp_path, heads=3)
    assert done.returncode != 0
    assert len(list(tmp_path.glob("process-*"))) == 1
    message = "num_attention_heads=3 is not a multiple of tensor_parallel_size=2"
    assert done.stderr.count(f"ValueError: {message}") == 1, done.stderr


@pytest.mark.parametrize(("victim", "launcher"), [(0, ()), (1, ()), (1, TORCHRUN)])
def test_a_job_ends_when_a_rank_is_killed_in_a_step(
    victim: int, launcher: tuple[str, ...], tmp_path: Path
) -> None:
    output, code = lose(victim, tmp_path, "cpu", *launcher)
    assert f"rank {victim} is killed" in output
    assert code != 0
    # It is named, by the rank that is left or, if that is faster, by Lightning or torchrun.
    signs = (
        rf"rank {victim} \(process \d+\) was killed",
        "terminated with code -9",
        r"Signal 9 \(SIGKILL\)",
    )
    assert any(re.search(sign, output) for sign in signs), output
    if not launcher:
        assert "Traceback" not in output and "gloo/" not in output, output


FAILING = """
import sys
from lightning.pytorch import Callback
from torch.utils.data import DataLoader
from tests.strategy.runs import Model, Sequences, make_trainer

class Mine(Model):
    def training_step(self, batch, batch_idx):
        if batch_idx == 1 and self.global_rank == 1:
            batch["tokenz"]
        return super().training_step(batch, batch_idx)

if __name__ == "__main__":
    strategy = {"tensor_parallel_size": 2}
    if sys.argv[1] == "kernel":
        strategy["kernels"] = {"attention": "flash_attn"}
    trainer = make_trainer(strategy, devices=2, max_steps=4)
    trainer.fit(Mine(), DataLoader(Sequences(), batch_size=8))
"""


@pytest.mark.parametrize("fault", ["module", "kernel"])
def test_the_rank_that_fails_first_says_why_and_no_other(fault: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(FAILING)
    done = subprocess.run(
        [sys.executable, str(script), fault],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode != 0
    said = done.stderr[re.search(r"rank \d failed first:", done.stderr).start() :]  # type: ignore[union-attr]
    assert done.stderr.count("Traceback") == (fault == "module"), said
    assert done.stderr.count("failed first") == 1, said
    assert "gloo/" not in done.stderr
    if fault == "module":
        assert said.startswith("rank 1 failed first:")
        assert said.count("KeyError: 'tokenz'") == 1 and 'batch["tokenz"]' in said
    else:
        assert said.count("kernels={attention: flash_attn} cannot be used here") == 1
    assert len(said.splitlines()) < 16, said


STOPPED = """
import sys
from lightning.pytorch import Callback
from torch.utils.data import DataLoader
from tests.strategy.runs import Model, Sequences, make_trainer

class Watch(Callback):
    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3:
            print(f"rank {trainer.global_rank} trains", flush=True)
    def on_exception(self, trainer, module, error):
        print(f"rank {trainer.global_rank} ends after {trainer.global_step} steps", flush=True)

if __name__ == "__main__":
    trainer = make_trainer({"tensor_parallel_size": 2}, [Watch()], devices=2, max_steps=100000)
    trainer.fit(Model(), DataLoader(Sequences(80000), batch_size=8))
"""


def _wait_for(text: str, file: Path, count: int) -> str:
    deadline = time.monotonic() + 600
    while file.read_text().count(text) < count:
        assert time.monotonic() < deadline, file.read_text()
        time.sleep(0.1)
    return file.read_text()


@pytest.mark.parametrize("told", [(0,), (1,), (0, 1)], ids=["first", "second", "both"])
def test_all_ranks_end_at_the_same_step_when_one_is_told_to(
    told: tuple[int, ...], tmp_path: Path
) -> None:
    script, output = tmp_path / "script.py", tmp_path / "output"
    script.write_text(STOPPED)
    job = subprocess.Popen(
        [sys.executable, str(script)],
        env=environment(),
        stdout=output.open("w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        _wait_for(" trains", output, count=2)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        processes = [job.pid, *map(int, children)]
        for rank in told:
            os.kill(processes[rank], signal.SIGTERM)
        job.wait(timeout=600)
        text = _wait_for(" steps", output, count=2)
        first, second = re.findall(r"ends after (\d+) steps", text)
        assert first == second
        for rank in told:
            assert f"[rank {rank}] SIGTERM: all ranks end at their next step" in text
    finally:
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def _orphaned(rank: int, whose: str) -> str:
    """What a process says, and is told, whose parent is killed and asked for only in the end."""
    heard, said = os.pipe()
    starter = os.fork()
    if starter == 0:
        os.close(heard)
        if os.fork() == 0:
            _orphan(whose, os.getppid(), said)
        time.sleep(300)
        os._exit(0)
    os.close(said)
    with open(heard) as output:
        assert output.readline() == "watching\n"
        os.kill(starter, signal.SIGKILL)
        text = output.read()  # ends when the orphan has closed its end
    os.waitpid(starter, 0)
    return text


def _orphan(whose: str, starter: int, said: int) -> NoReturn:
    os.dup2(said, 2)  # where it would say why it ends
    os.environ[PARENT] = str(1 if whose == "another" else starter)
    if whose == "ours, late":
        os.write(said, b"watching\n")
        while os.getppid() == starter:
            time.sleep(0.01)
    done = watch_parent(grace=1.0)
    os.write(said, b"watching\n")
    if whose == "done":
        done.set()
    time.sleep(300 if "ours" in whose else 6)
    os.write(said, b"slept\n")
    os._exit(0)


@pytest.mark.parametrize("whose", ["ours", "ours, late", "another", "done"])
def test_a_rank_ends_after_the_one_that_has_started_it(whose: str) -> None:
    """Also if that one ends before it is looked for, and nobody asks how: it is not waited for."""
    (text,) = run_ranks(1, _orphaned, whose)
    assert ("slept" in text) == ("ours" not in whose)
    assert ("so does this one" in text) == ("ours" in whose)
