"""Scripts that Lightning's own launcher starts again for every rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.strategy.lost_rank import TORCHRUN, lose

ROOT = Path(__file__).resolve().parents[2]
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
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, str(script), str(folder), str(heads)],
        env={**clean, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_two_ranks_are_started_and_train_together(tmp_path: Path) -> None:
    done = _run(tmp_path, heads=4)
    assert done.returncode == 0, done.stderr
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
    # The rank that is left says that it lost its connection, unless the launcher is faster.
    signs = ("Connection", "terminated with code -9", "Signal 9 (SIGKILL)")
    assert any(sign in output for sign in signs), output
