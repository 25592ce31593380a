"""How a job of several processes ends when one of them is told to, or is killed.

Lightning's own handler of SIGTERM calls a collective wherever the signal finds the process. In the
middle of a step that is for ever: one rank waits in the handler's collective, another in one of the
step's. Its training loop asks another rank before each step, and drains the device to hear the
answer. Here the handler only takes note, and all ranks end together where they meet next.

At the start of a step each rank asks all others, in host memory, whether one was told, and reads
what they answered to the question of the step before. That answer is there once every rank's host
has begun the step before, so no rank waits for one that is less than a step behind, nor for its
device. All read the same answers in the same order, so all end at the start of the same step:

    rank 0   asks 1 |  step 1  | reads 1, asks 2 | step 2, told | reads 2, asks 3 | step 3 | reads 3
    rank 1     asks 1 |  step 1  | reads 1, asks 2 |   step 2   | reads 2, asks 3 | step 3 | reads 3
"""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_dhellam.parallel.hosts import Question

if TYPE_CHECKING:
    import lightning.pytorch as pl
    import torch.distributed as dist

PARENT = "DHELLAM_PARENT"
"""Environment variable with the process that has started this one as a rank of its job."""
_NOTIFIER = "_sigterm_notifier_fn"
_ASKER = "_broadcast_sigterm_tensor"
_GRACE = 30.0


class Termination:
    """SIGTERM of a run, for all of its ranks.

    What others do at SIGTERM, a user's handler or the requeueing of SLURM, is done as ever.

    Args:
        trainer: that has not yet registered its handlers.
        group: of all ranks, for tensors in host memory; None where there are no others.
    """

    def __init__(self, trainer: pl.Trainer, group: dist.ProcessGroup | None) -> None:
        self._connector = trainer._signal_connector
        self._loop = trainer.fit_loop.epoch_loop
        self._rank = trainer.global_rank
        self._group = group
        self._told = False
        self._asked: Question | None = None
        setattr(self._connector, _NOTIFIER, self._note)
        setattr(self._loop, _ASKER, _nothing)

    def check(self) -> None:
        """End every rank if any was told to end before the last check. For the start of a step.

        All ranks must call this and `meet` at the same places. It waits for no device.

        Raises:
            SIGTERMException: as Lightning does, which runs the callbacks' `on_exception`.
        """
        self._end_if(self._answer())
        self._ask()

    def meet(self) -> None:
        """End every rank if any was told to end by now. For places where ranks wait anyway.

        Raises:
            SIGTERMException: as `check`.
        """
        self._end_if(self._answer())
        self._ask()
        self._end_if(self._answer())

    def close(self) -> None:
        """Let Lightning's handler be registered again by the next run."""
        self._connector.__dict__.pop(_NOTIFIER, None)
        self._loop.__dict__.pop(_ASKER, None)

    def _ask(self) -> None:
        self._asked = Question([self._told], self._group)

    def _answer(self) -> bool:
        """Whether any rank had been told when it asked last; not asked yet is no."""
        if self._asked is None:
            return False
        asked, self._asked = self._asked, None
        return asked.answer()[0] > 0

    def _end_if(self, told: bool) -> None:
        if told:
            self._connector.received_sigterm = True
            raise SIGTERMException

    def _note(self, signum: int, frame: Any) -> None:
        if not self._told:
            self._told = True
            message = f"[rank {self._rank}] {signal.Signals(signum).name}: all ranks end at"
            # Not by `print`, in the middle of which the signal may have come.
            os.write(2, f"{message} their next step or the one after it\n".encode())


def _nothing() -> None:
    """Lightning's loop need not ask: `Termination` does."""


def parent_of_rank() -> int | None:
    """The process that has started this one as a rank of its job, if one has."""
    parent = os.environ.get(PARENT)
    return int(parent) if parent else None


def watch_parent(grace: float) -> threading.Event:
    """If a rank has started this process, end it `grace` seconds after that one has ended.

    Nobody else would: with NCCL the collectives of those that are left wait for the dead one, and
    the store through which they would agree on that was in it. Returns what ends the watch, for
    when this process has work left that needs no other.
    """
    done = threading.Event()
    parent = os.getppid()
    if os.environ.get(PARENT) == str(parent):
        arguments = (parent, min(grace, _GRACE), done)
        threading.Thread(target=_watch, args=arguments, daemon=True).start()
    return done


def _watch(parent: int, grace: float, done: threading.Event) -> None:
    while os.getppid() == parent:
        if done.wait(0.5):
            return
    # Where the other one was done, this one is about to be.
    if not done.wait(grace):
        message = f"process {parent}, which has started this one, ended {grace:.0f} s ago"
        os.write(2, f"{message}: so does this one\n".encode())
        os._exit(1)
