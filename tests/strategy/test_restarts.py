"""Jobs that torchrun starts again go on from the newest whole checkpoint that they have saved."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_dhellam.strategy import DHellamStrategy, restarts
from lightning_dhellam.strategy.restarts import (
    Life,
    RestartingLauncher,
    nodes_of_life,
    store_of_life,
)
from tests.strategy.restarted import DEATH, EVERY, STEPS
from tests.strategy.runs import Losses, Model, loader, make_trainer

REPOSITORY = Path(__file__).resolve().parents[2]


def test_torchrun_starts_a_killed_job_again(tmp_path: Path) -> None:
    """More often than the one death needs: on a busy machine processes may not find each other."""
    words = ["--nproc-per-node=2", "--max-restarts=4", "--standalone", "--monitor-interval=0.2"]
    script = ["-m", "tests.strategy.restarted", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *words, *script],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=1000,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "died").exists()
    # Of the last life, which has come to the end.
    straight, killed = (
        json.loads(sorted(tmp_path.glob(f"{name}-*"))[-1].read_text())
        for name in ("straight", "killed")
    )
    assert straight[0] == 0 and len(set(straight[1])) == STEPS
    first, losses = killed
    assert first >= DEATH // EVERY * EVERY and first % EVERY == 0
    assert losses == straight[1][first:]
    assert "of the job: going on from" in done.stderr + done.stdout


class Failing(Callback):
    """Raises at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise OSError("a node is lost")


class Job:
    """A job of one process in a folder, in one life after another.

    Attributes:
        id: of the job, as `--rdzv-id` gives it.
    """

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, id: str = "none") -> None:
        self.root, self.id = root, id
        self._environment = monkeypatch
        self._port = str(find_free_network_port())

    def fit(
        self,
        restarts: int,
        steps: int,
        *callbacks: Callback,
        resume: Any = None,
        weights: str | None = None,
    ) -> list[int]:
        """The steps of a life that were done."""
        for name, value in {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "GROUP_RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": self._port,
            "TORCHELASTIC_RUN_ID": self.id,
            "TORCHELASTIC_MAX_RESTARTS": "3",
            "TORCHELASTIC_RESTART_COUNT": str(restarts),
        }.items():
            self._environment.setenv(name, value)
        # In each life the script has the same runs.
        self._environment.setattr("lightning_dhellam.strategy.processes.JobStrategy._runs", 0)
        losses = Losses()
        trainer = make_trainer(
            {},
            [losses, *callbacks],
            max_steps=steps,
            default_root_dir=self.root,
            enable_checkpointing=any(isinstance(one, ModelCheckpoint) for one in callbacks),
        )
        trainer.fit(Model(num_layers=1), loader({}), ckpt_path=resume)
        if weights is not None:
            trainer.save_checkpoint(self.root / "checkpoints" / weights, weights_only=True)
        done = range(trainer.global_step - len(losses.values), trainer.global_step)
        return [step + 1 for step in done]

    def fail(self, step: int, **options: Any) -> None:
        """A life that ends in an error after a step, each of which has a checkpoint."""
        keep = ModelCheckpoint(every_n_train_steps=1, save_top_k=-1)
        with pytest.raises(OSError, match="a node is lost"):
            self.fit(0, step + 1, keep, Failing(step), **options)

    def checkpoint(self, step: int) -> Path:
        """That of a step."""
        return self.root / "checkpoints" / f"epoch=0-step={step}.ckpt"


@pytest.mark.parametrize("resume", [None, "last", "first"])
def test_any_ckpt_path_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str | None
) -> None:
    job = Job(tmp_path, monkeypatch)
    job.fail(3)
    given = job.checkpoint(1) if resume == "first" else resume
    assert job.fit(1, 5, resume=given) == [3, 4, 5]  # the third one failed before it was saved


def test_what_is_not_whole_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path, monkeypatch)
    job.fail(4)
    (job.root / ".restarts").mkdir(exist_ok=True)
    file = job.checkpoint(3) / "rest.pt"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(UserWarning, match=r"older checkpoint: .*step=3.ckpt/rest.pt is damaged"):
        assert job.fit(1, 5, weights="weights.ckpt") == [3, 4, 5]
    with pytest.warns(UserWarning, match="older checkpoint"):
        assert job.fit(2, 4) == [3, 4]  # not from weights alone
    changed = job.checkpoint(2) / "rest.pt"
    whole = changed.read_bytes()
    changed.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.warns(UserWarning, match=r"step=2.ckpt/rest.pt .*going on from .*step=1.ckpt"):
        assert job.fit(2, 3) == [2, 3]
    changed.write_bytes(whole)
    (job.checkpoint(2) / "topology.json").unlink()
    with pytest.warns(UserWarning, match="older checkpoint"):
        assert job.fit(3, 3) == [2, 3]


def test_other_jobs_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(tmp_path, monkeypatch)
    job.fail(3)
    assert Job(tmp_path, monkeypatch, "other").fit(1, 1) == [1]
    assert job.fit(0, 1) == [1]  # of no id: the next job
    assert job.fit(1, 1) == [1]  # which has saved nothing


def test_a_job_of_an_id_goes_on_until_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(tmp_path, monkeypatch, "mine")
    job.fail(3)
    assert job.fit(0, 3, resume=job.checkpoint(1)) == [2, 3]  # given is given
    job.fail(3, resume=job.checkpoint(1))
    keep = ModelCheckpoint(every_n_train_steps=1)
    assert job.fit(0, 4, keep) == [3, 4]
    assert job.fit(0, 2) == [1, 2]


def test_ranks_that_see_different_files_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = RestartingLauncher(Life("job", 1), lambda: 1, lambda trainer: None)
    for found, refused in (([None, Path("a.ckpt")], True), ([None, None], False)):
        monkeypatch.setattr(restarts, "of_all_ranks", lambda *_, found=found: found)
        if refused:
            with pytest.raises(ValueError, match=r"rank 0 does not see a\.ckpt, from which other"):
                launcher.check_agreed(None)
        else:
            launcher.check_agreed(None)


def test_a_life_does_not_see_the_addresses_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(kept.port),
        "TORCHELASTIC_MAX_RESTARTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert store_of_life(timedelta(seconds=300)) == {}
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    lives = []
    for number in range(2):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))
        lives.append(store_of_life(timedelta(seconds=300))["store"])
    lives[0].set("address", "of a dead process")
    assert lives[0].check(["address"]) and not lives[1].check(["address"])


@pytest.mark.parametrize(
    ("processes", "here", "nodes"), [(8, 4, 2), (4, 4, 1), (8, 2, 3), (6, 4, 3)]
)
def test_the_environment_says_how_many_nodes_there_are(
    monkeypatch: pytest.MonkeyPatch, processes: int, here: int, nodes: int
) -> None:
    """Unless it has other devices than the Trainer, which is refused afterwards."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    assert nodes_of_life(devices=4, num_nodes=3) == nodes


def test_a_trainer_of_a_life_has_its_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "job",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="the job has 4 processes"):
        make_trainer({}, devices=2, num_nodes=3)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    trainer = make_trainer({"tensor_parallel_size": 2}, devices=2, num_nodes=3)
    assert isinstance(trainer.strategy, DHellamStrategy)
    assert (trainer.num_nodes, trainer.strategy.topology.dp_size) == (2, 2)
