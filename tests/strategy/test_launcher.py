"""Scripts that Lightning's own launcher starts again for every rank."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import pytest

from lightning_dhellam.strategy.termination import PARENT, watch_parent
from tests.ranks import run_ranks
from tests.strategy.lost_rank import environment, lose

SCRIPT = """
import json, os, sys
from pathlib import Path
from torch.utils.data import DataLoader
from tests.strategy.runs import Losses, Model, Sequences, make_trainer

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    (folder / f"process-{os.getpid()}").touch()
    losses = Losses()
    strategy = {"tensor_parallel_size": 2, "micro_batch_size": 3}
    trainer = make_trainer(strategy, [losses], devices=2, max_steps=4)
    trainer.fit(Model(), DataLoader(Sequences(), batch_size=8))
    (folder / f"losses-{trainer.global_rank}").write_text(json.dumps(losses.values))
"""


def _run(folder: Path, text: str, *words: str) -> subprocess.CompletedProcess[str]:
    script = folder / "script.py"
    script.write_text(text)
    return subprocess.run(
        [sys.executable, str(script), *words],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_two_ranks_are_started_and_train_together(tmp_path: Path) -> None:
    done = _run(tmp_path, SCRIPT, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "Apex" not in done.stderr, "Megatron warns of what is not needed"
    assert len(list(tmp_path.glob("process-*"))) == 2
    first, second = (json.loads((tmp_path / f"losses-{rank}").read_text()) for rank in (0, 1))
    assert first == second and len(first) == 4


@pytest.mark.parametrize("victim", [0, 1])
def test_a_job_ends_when_a_rank_is_killed_in_a_step(victim: int, tmp_path: Path) -> None:
    output, code = lose(victim, tmp_path, "cpu")
    assert f"rank {victim} is killed" in output
    assert code != 0
    # It is named, by the rank that is left or, if that is faster, by Lightning.
    signs = (rf"rank {victim} \(process \d+\) was killed", "terminated with code -9")
    assert any(re.search(sign, output) for sign in signs), output
    assert "Traceback" not in output and "gloo/" not in output, output


FAILING = """
import sys
from contextlib import suppress
from torch.utils.data import DataLoader
from tests.strategy.runs import Model, Sequences, make_trainer

class Mine(Model):
    def training_step(self, batch, batch_idx):
        if batch_idx == 1 and self.global_rank == 1:
            batch["tokenz"]
        return super().training_step(batch, batch_idx)

def fit(**strategy):
    trainer = make_trainer({"tensor_parallel_size": 2, **strategy}, devices=2, max_steps=4)
    trainer.fit(Mine(), DataLoader(Sequences(), batch_size=8))

if __name__ == "__main__":
    with suppress(ValueError):
        fit(kernels={"attention": "flash_attn"})
    fit()
"""


def test_the_rank_that_fails_first_says_why_and_no_other(tmp_path: Path) -> None:
    """Also in the second run of a script, after one in which all ranks fail alike."""
    done = _run(tmp_path, FAILING)
    assert done.returncode != 0
    _, alike, alone = re.split(r"(?=rank \d failed first:)", done.stderr)
    assert "Traceback" not in alike, alike
    assert alike.count("kernels={attention: flash_attn} cannot be used here") == 1
    assert alone.startswith("rank 1 failed first:") and alone.count("Traceback") == 1, alone
    assert alone.count("KeyError: 'tokenz'") == 1 and 'batch["tokenz"]' in alone
    assert "gloo/" not in done.stderr
    assert len(alone.splitlines()) < 16, alone


WHOSE = ("ours", "ours, late", "another", "done")
"""Parents: that of the rank, before it is killed or after, another process, that of a done rank."""


def _orphaned(rank: int) -> str:
    """What a process says, and is told, whose parent is killed and asked for only in the end."""
    whose = WHOSE[rank]
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


def test_a_rank_ends_after_the_one_that_has_started_it() -> None:
    """Also if that one ends before it is looked for, and nobody asks how: it is not waited for."""
    for whose, text in zip(WHOSE, run_ranks(len(WHOSE), _orphaned), strict=True):
        assert ("slept" in text) == ("ours" not in whose), whose
        assert ("so does this one" in text) == ("ours" in whose), whose
