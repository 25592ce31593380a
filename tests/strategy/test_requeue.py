"""SLURM's signal to requeue: whenever it comes, all ranks save at the end of a step, and the job
that goes on is the one that was never interrupted."""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_dhellam.checkpoint.writing import aside_of
from lightning_dhellam.strategy.finding import Finding
from tests.ranks import run_ranks
from tests.strategy.runs import Model, loader, make_trainer

STEPS, MOMENTS = 5, 20
SCONTROL = """#!/bin/sh
# Notes the call, and ends the job, as SLURM does to start it again.
echo "$@" >> {folder}/calls
kill -TERM $(cat {folder}/pid-*)
"""


class Operators(TorchDispatchMode):
    """Sends this process a signal when it is about to compute its n-th operator."""

    def __init__(self, number: int | None) -> None:
        super().__init__()
        self.number, self.count = number, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.count == self.number:
            os.kill(os.getpid(), signal.SIGUSR1)
        self.count += 1
        return func(*args, **(kwargs or {}))


class Moment(Callback):
    """The n-th operator of training, at which the signal comes; None for never."""

    def __init__(self, number: int | None) -> None:
        self.operators = Operators(number)
        self._training = ExitStack()

    def on_train_start(self, *_: Any) -> None:
        self._training.enter_context(self.operators)

    def on_train_end(self, *_: Any) -> None:
        self._training.close()

    def on_exception(self, *_: Any) -> None:
        self._training.close()


def _told(rank: int, tasks: int) -> dict[str, str]:
    """What SLURM tells a rank."""
    return {
        "RANK": str(rank),  # for the loader
        "WORLD_SIZE": str(tasks),
        "SLURM_NTASKS": str(tasks),
        "SLURM_NTASKS_PER_NODE": str(tasks),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NODEID": "0",
        "SLURM_NNODES": "1",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NAME": "train",
    }


def _join(rank: int, folder: Path) -> None:
    """Be a rank of a job of SLURM's."""
    os.environ |= {**_told(rank, 2), "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    (folder / f"pid-{rank}").write_text(f"{os.getpid()}\n")


def _fit(folder: Path, moment: Moment) -> tuple[int, float] | None:
    """Steps and sum of the weights in the end; None if the job was ended before."""
    trainer: Trainer = make_trainer({}, [moment], max_steps=STEPS, default_root_dir=folder)
    assert isinstance(trainer._accelerator_connector.cluster_environment, SLURMEnvironment)
    module = Model(num_layers=1)
    with suppress(SIGTERMException):
        trainer.fit(module, loader({}))
        weights = sum(p.double().sum().item() for p in module.parameters())
        return trainer.global_step, weights
    return None


def _on_rank(rank: int, folder: Path) -> list[Any]:
    _join(rank, folder)
    counting = Moment(None)
    never = _fit(folder / "never", counting)
    found: list[Any] = [never]
    for number in range(MOMENTS):
        root = folder / f"{number}"
        # The first rank, the second, or both.
        told = (0,), (1,), (0, 1)
        mine = rank in told[number % 3]
        moment = Moment(counting.operators.count * number // MOMENTS if mine else None)
        torch.distributed.barrier()
        ended = _fit(root, moment)
        torch.distributed.barrier()
        saved = sorted(path.name for path in root.glob("*"))
        calls = (folder / "calls").read_text().split("\n") if (folder / "calls").exists() else []
        torch.distributed.barrier()
        (folder / "calls").unlink(missing_ok=True)
        found.append((ended, saved, [call for call in calls if call], _fit(root, Moment(None))))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module")
def outcomes(folder: Path) -> list[list[Any]]:
    stub = folder / "scontrol"
    stub.write_text(SCONTROL.format(folder=folder))
    stub.chmod(0o755)
    return run_ranks(2, _on_rank, folder, timeout=600)


def test_a_requeued_job_ends_as_the_one_that_was_never_interrupted(
    outcomes: list[list[Any]],
) -> None:
    requeued = 0
    for never, *moments in outcomes:
        assert never[0] == STEPS
        for ended, saved, calls, gone_on in moments:
            if ended is None:
                assert saved == ["hpc_ckpt_1.ckpt"]
                assert calls == ["requeue 17"]
                requeued += 1
            else:  # too late: in the last steps
                assert ended == never
            assert gone_on == never
    # On both ranks, and at most moments.
    assert requeued % 2 == 0 and requeued >= MOMENTS


def test_a_requeued_job_may_have_other_sizes(
    outcomes: list[list[Any]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never, *moments = outcomes[0]
    number = next(i for i, (ended, *_) in enumerate(moments) if ended is None)
    for name, value in _told(0, 1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", str(find_free_network_port()))
    gone_on = _fit(folder / f"{number}", Moment(None))
    assert gone_on == pytest.approx(never, rel=1e-5)


def test_a_job_goes_on_from_the_last_whole_checkpoint(tmp_path: Path) -> None:
    whole = tmp_path / "hpc_ckpt_1.ckpt"
    whole.mkdir()
    aside_of(tmp_path / "hpc_ckpt_2.ckpt").mkdir()  # its job was killed while it saved
    trainer = make_trainer({}, default_root_dir=tmp_path)
    assert trainer._checkpoint_connector._hpc_resume_path == str(whole)


@pytest.mark.parametrize("newer", ["last", "hpc_ckpt_1"])
def test_a_job_that_asks_for_the_last_gets_the_newest_of_both(tmp_path: Path, newer: str) -> None:
    for name in ("last", "hpc_ckpt_1"):
        (tmp_path / f"{name}.ckpt").mkdir()
        moment = 2000 if name == newer else 1000
        os.utime(tmp_path / f"{name}.ckpt", (moment, moment))
    keep = ModelCheckpoint(tmp_path, save_last=True)
    trainer = make_trainer({}, [keep], default_root_dir=tmp_path, enable_checkpointing=True)
    Finding(trainer)
    found = []
    for of_slurm in (True, False):
        with mock.patch.object(SLURMEnvironment, "detect", return_value=of_slurm):
            parse = trainer._checkpoint_connector._parse_ckpt_path
            known = {"model_provided": True, "model_connected": True}
            found.append(parse(TrainerFn.FITTING, "last", **known))
    assert found == [str(tmp_path / f"{newer}.ckpt"), str(tmp_path / "last.ckpt")]
