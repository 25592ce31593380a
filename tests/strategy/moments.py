"""Jobs of two ranks of which one is told to end, or killed, at a certain moment of a run.

A process with all imports done forks the first rank, which forks the second, as Lightning's
launcher would start it; so a job costs little more than its run.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_dhellam.autosearch import candidates
from lightning_dhellam.autosearch.measuring import Measuring
from lightning_dhellam.callbacks import AutoSearch
from lightning_dhellam.engine.walk import Walker
from lightning_dhellam.strategy import termination
from tests.process_groups import is_running
from tests.ranks import _PRELOAD
from tests.strategy.runs import Model, Sequences, make_trainer

_PATIENCE = 300.0
"""Seconds after which a job hangs, on however slow a machine."""


class Job(NamedTuple):
    """A job, and what befalls it.

    Attributes:
        moment: name of the place in the run.
        signum: SIGTERM or SIGKILL.
        victim: rank that is sent the signal.
        accelerator: that the ranks compute on.
        schedule: of a pipeline whose stages the ranks are; nothing if they share each layer.
    """

    moment: str
    signum: int
    victim: int
    accelerator: str = "cpu"
    schedule: str = ""

    def __str__(self) -> str:
        place = f"rank-{self.victim}" + f"-of-{self.schedule}" * bool(self.schedule)
        return f"{self.moment}-{signal.Signals(self.signum).name}-{place}"


class Ended(NamedTuple):
    """How a job ended: whether all processes are gone, and what they said."""

    gone: bool
    output: str


class Befalls(Callback):
    """Sends the signal when the moment comes."""

    def __init__(self, job: Job, rank: int) -> None:
        self.job, self.rank = job, rank
        self.due = rank == job.victim

    def here(self, moment: str) -> None:
        """This is a moment."""
        if self.due and moment == self.job.moment:
            self.due = False
            print(f"rank {self.rank}: {self.job}", flush=True)
            os.kill(os.getpid(), self.job.signum)

    def setup(self, *_: Any, **__: Any) -> None:
        self.here("setup")

    def on_fit_start(self, *_: Any) -> None:
        self.here("fit")

    def on_train_start(self, *_: Any) -> None:
        self.here("training")

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self.here(f"batch {trainer.global_step}")

    def on_before_optimizer_step(self, trainer: Trainer, *_: Any) -> None:
        self.here(f"gradients {trainer.global_step}")

    def on_validation_batch_start(self, *_: Any) -> None:
        self.here("validation")

    def on_save_checkpoint(self, *_: Any) -> None:
        self.here("saving")

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        print(f"rank {self.rank} ends after {trainer.global_step} steps", flush=True)


def _search_at(befalls: Befalls) -> None:
    """Moments of a search. One that is told while it solves would go on for ever."""
    between, solve = Measuring._between, candidates.solve

    def measured(self: Any, done: int, total: int, label: str) -> None:
        if done == 2:
            befalls.here("profile")
        between(self, done, total, label)

    def solved(*args: Any, **options: Any) -> Any:
        if befalls.due and befalls.job.moment == "solve":
            befalls.here("solve")
            while True:
                time.sleep(0.01)
        return solve(*args, **options)

    Measuring._between = measured  # type: ignore[method-assign]
    candidates.solve = solved


def _walk_at(befalls: Befalls, walks: int = 9) -> None:
    """A moment within a step, when messages are under way between stages."""
    whole_pass, counted = Walker._pass, count(1)

    def walked(self: Any, *args: Any) -> None:
        whole_pass(self, *args)
        if next(counted) == walks:
            befalls.here("walk")

    Walker._pass = walked  # type: ignore[method-assign]


def _run(job: Job, rank: int, folder: Path) -> None:
    termination._GRACE = 1.0
    befalls = Befalls(job, rank)
    befalls.here("start-up")
    strategy: dict[str, Any] = {"tensor_parallel_size": 2}
    if job.schedule:
        strategy = {"pipeline_parallel_size": 2, "schedule": job.schedule}
        _walk_at(befalls)
    callbacks: list[Callback] = [befalls, ModelCheckpoint(folder, every_n_train_steps=3)]
    if job.moment in ("profile", "solve", "trial"):
        _search_at(befalls)
        callbacks.append(AutoSearch(rounds=1, replay=True, folder=str(folder)))
    trainer = make_trainer(
        strategy,
        callbacks,
        accelerator=job.accelerator,
        max_epochs=100_000,
        limit_train_batches=4,
        num_sanity_val_steps=0,
        enable_checkpointing=True,
    )
    join = trainer.strategy._join_processes  # type: ignore[attr-defined]

    def joined() -> None:
        befalls.here("connecting")
        join()

    trainer.strategy._join_processes = joined  # type: ignore[attr-defined]
    data = DataLoader(Sequences(64), batch_size=8)
    model = Model(num_layers=4 if job.schedule else 1)
    trainer.fit(model, data, DataLoader(Sequences(16), batch_size=8))


def _be_rank(job: Job, rank: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    try:
        _run(job, rank, folder)
    except BaseException as error:
        print(f"rank {rank} ends by {type(error).__name__}", flush=True)
        if not isinstance(error, SystemExit):
            os._exit(1)
    os._exit(0)


def _first(job: Job, folder: Path) -> None:
    """Be the process that starts the other."""
    os.setpgid(0, 0)
    with (folder / "output").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ |= {
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "TORCHELASTIC_RUN_ID": "tests",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        os.environ[termination.PARENT] = str(parent)
        _be_rank(job, 1, folder)
    # As Lightning's launcher does with the processes that it has started.
    children: Any = [_Child(child)]
    _ChildProcessObserver(parent, children, sleep_period=1).start()
    _be_rank(job, 0, folder)


class _Child:
    """What the launcher knows of a process that it has started."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> None:
        if self.returncode is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if found else None

    def send_signal(self, signum: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, signum)


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def _drive(jobs: Sequence[Job], folder: Path) -> None:
    torch.set_num_threads(1)
    for number, job in enumerate(jobs):
        place = folder / str(number)
        place.mkdir()
        process = os.fork()
        if process == 0:
            _first(job, place)
        gone = _end(process)
        ended = {"gone": gone, "output": (place / "output").read_text()}
        (place / "ended.json").write_text(json.dumps(ended))


def _end(group: int) -> bool:
    """Whether all processes of a job end by themselves. None is left in any case."""
    deadline = time.monotonic() + _PATIENCE
    reaped = False
    while time.monotonic() < deadline:
        if not reaped:
            reaped = os.waitpid(group, os.WNOHANG)[0] != 0
        if reaped and not is_running(group):
            return True
        time.sleep(0.05)
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    if not reaped:
        os.waitpid(group, 0)
    return False


def end(jobs: Sequence[Job], folder: Path) -> Iterator[tuple[Job, Ended]]:
    """Run jobs, one after the other, each in a process that other tests do not see."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_PRELOAD, __name__])
    driver = context.Process(target=_drive, args=(jobs, folder))
    driver.start()
    driver.join()
    for number, job in enumerate(jobs):
        file = folder / str(number) / "ended.json"
        assert file.exists(), f"{job}: the driver ended with {driver.exitcode}"
        yield job, Ended(**json.loads(file.read_text()))
