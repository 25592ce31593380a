"""How a job of several processes ends when one of them is told to, or is killed.

Lightning's own handler of SIGTERM calls a collective wherever the signal finds the process. In the
middle of a step that is for ever: one rank waits in the handler's collective, another in one of the
step's. Here the handler only takes note, and all ranks end together before their next step.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_dhellam.parallel.collectives import largest

if TYPE_CHECKING:
    import lightning.pytorch as pl

PARENT = "DHELLAM_PARENT"
"""Environment variable with the process that has started this one as a rank of its job."""
_POLL = 0.5
_GRACE = 30.0


class Termination:
    """SIGTERM of a training run, for all of its ranks.

    Lightning puts the former handler back when training ends.

    Args:
        trainer: that has just registered its handlers.
        group: of all ranks.
    """

    def __init__(self, trainer: pl.Trainer, group: dist.ProcessGroup) -> None:
        self._trainer = trainer
        self._group = group
        self._told = False
        if threading.current_thread() is threading.main_thread():
            theirs = trainer._signal_connector._sigterm_notifier_fn
            composed = getattr(signal.getsignal(signal.SIGTERM), "signal_handlers", [])
            self._others = [handler for handler in composed if handler != theirs]
            signal.signal(signal.SIGTERM, self._note)

    def check(self) -> None:
        """Before a step: end it on every rank if any rank was told to end.

        Raises:
            SIGTERMException: as Lightning does, which runs the callbacks' `on_exception`.
        """
        if largest(torch.tensor(float(self._told)), self._group) > 0:
            self._trainer._signal_connector.received_sigterm = True
            raise SIGTERMException

    def _note(self, signum: int, frame: Any) -> None:
        if not self._told:
            self._told = True
            rank = self._trainer.global_rank
            print(f"[rank {rank}] SIGTERM: all ranks end before their next step", file=sys.stderr)
        for handler in self._others:
            if callable(handler):
                handler(signum, frame)


def end_after_parent(grace: float) -> None:
    """If a rank has started this process, end it when that rank is killed, after `grace` seconds.

    Nobody else would: with NCCL the collectives of those that are left wait for the dead one, and
    the store through which they would agree on that was in it.
    """
    parent = os.getppid()
    if os.environ.get(PARENT) != str(parent):
        return
    watcher = threading.Thread(target=_watch, args=(parent, min(grace, _GRACE)), daemon=True)
    watcher.start()


def _watch(parent: int, grace: float) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL)
    # Where the other one was done, this one needs a moment to be done as well.
    time.sleep(grace)
    message = (
        f"process {parent}, which has started this one, ended {grace:.0f} s ago: so does this one"
    )
    print(message, file=sys.stderr, flush=True)
    os._exit(1)
