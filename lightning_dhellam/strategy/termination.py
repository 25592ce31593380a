"""How a job of several processes ends when one of them is told to, or is killed.

Lightning's own handler of SIGTERM calls a collective wherever the signal finds the process. In the
middle of a step that is for ever: one rank waits in the handler's collective, another in one of the
step's. Here the handler only takes note, and all ranks end together where they meet next.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_dhellam.parallel.collectives import largest

if TYPE_CHECKING:
    import lightning.pytorch as pl

PARENT = "DHELLAM_PARENT"
"""Environment variable with the process that has started this one as a rank of its job."""
_NOTIFIER = "_sigterm_notifier_fn"
_GRACE = 30.0


class Termination:
    """SIGTERM of a run, for all of its ranks.

    What others do at SIGTERM, a user's handler or the requeueing of SLURM, is done as ever.

    Args:
        trainer: that has not yet registered its handlers.
        group: of all ranks.
    """

    def __init__(self, trainer: pl.Trainer, group: dist.ProcessGroup) -> None:
        self._connector = trainer._signal_connector
        self._rank = trainer.global_rank
        self._group = group
        self._told = False
        setattr(self._connector, _NOTIFIER, self._note)

    def check(self) -> None:
        """End every rank if any rank was told to end. All must call this at the same place.

        Raises:
            SIGTERMException: as Lightning does, which runs the callbacks' `on_exception`.
        """
        if largest(torch.tensor(float(self._told)), self._group) > 0:
            self._connector.received_sigterm = True
            raise SIGTERMException

    def close(self) -> None:
        """Let Lightning's handler be registered again by the next run."""
        self._connector.__dict__.pop(_NOTIFIER, None)

    def _note(self, signum: int, frame: Any) -> None:
        if not self._told:
            self._told = True
            message = f"[rank {self._rank}] {signal.Signals(signum).name}: all ranks end at"
            # Not by `print`, in the middle of which the signal may have come.
            os.write(2, f"{message} their next step\n".encode())


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
