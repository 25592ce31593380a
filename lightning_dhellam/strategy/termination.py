"""How a job of several processes ends when one of them is told to, or saves itself to be requeued.

Lightning's own handlers call collectives wherever the signal finds the process. In the middle of a
step that is for ever: one rank waits in the handler's collective, another in one of the step's. Its
training loop asks another rank before each step, and drains the device to hear the answer. Here the
handlers only take note, and all ranks obey together where they meet next.

At the end of a step each rank asks all others, in host memory, whether one was told, and reads what
they answered to the question of the step before. That answer is there once every rank's host has
ended the step before, so no rank waits for one that is less than a step behind, nor for its device.
All read the same answers in the same order, so all obey at the end of the same step. Who is told
tells the other processes of its node: a rank that computes alone, as in a search, asks nobody.

    rank 0   step 1  | reads 0, asks 1 | step 2, told | reads 1, asks 2 | step 3 | reads 2, obeys
    rank 1     step 1  | reads 0, asks 1 |   step 2   | reads 1, asks 2 | step 3 | reads 2, obeys
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from typing_extensions import override

from lightning_dhellam.parallel.hosts import Question

if TYPE_CHECKING:
    import lightning.pytorch as pl
    import torch.distributed as dist

PARENT = "DHELLAM_PARENT"
"""Environment variable with the process that has started this one as a rank of its job."""
_NOTIFIER = "_sigterm_notifier_fn"
_REQUEUER = "_slurm_sigusr_handler_fn"
_ASKER = "_broadcast_sigterm_tensor"
_GRACE = 10.0
"""Seconds that a process may take to end after the one that has started it, or by itself."""


class Termination(Callback):
    """SIGTERM of a run, and the signal at which SLURM's jobs requeue themselves, for all ranks.

    A callback of the trainer's, behind all others, so that what they do at the end of a step is
    done. What a user's own handler of SIGTERM does is done as ever.

    Before training begins a signal does what it does to any process: there is nothing to lose.

    Args:
        trainer: that has not yet registered its handlers.
        group: of all ranks, for tensors in host memory; None where there are no others.
        saving_at_once: inside of which checkpoints are complete when they are saved.

    Attributes:
        told: whether this process was told to end.
    """

    def __init__(
        self,
        trainer: pl.Trainer,
        group: dist.ProcessGroup | None,
        saving_at_once: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._trainer = trainer
        self._connector = trainer._signal_connector
        self._loop = trainer.fit_loop.epoch_loop
        self._group = group
        self._saving_at_once = saving_at_once
        self.told = self._to_requeue = self._has_requeued = False
        self._at_once = False
        self._asked: Question | None = None
        _callbacks(trainer).append(self)
        setattr(self._connector, _NOTIFIER, self._note_end)
        setattr(self._connector, _REQUEUER, self._note_requeue)
        setattr(self._loop, _ASKER, _nothing)

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        """Obey what any rank was told before the end of the last step. Waits for no device."""
        asked, self._asked = self._asked, self._ask()
        if self._group is None:
            asked = self._asked
        if asked is None:
            return
        told, to_requeue = asked.answer()
        if to_requeue and not self._has_requeued:
            self._has_requeued = True
            self._requeue()
        if told:
            # Lightning's loop ends by this when the step's numbers are logged.
            self._connector.received_sigterm = True

    def check(self) -> None:
        """End every rank if any was told to end before the last check. For batches of other loops.

        All ranks must call this and `meet` at the same places. It waits for no device.

        Raises:
            SIGTERMException: as Lightning does, which runs the callbacks' `on_exception`.
        """
        asked, self._asked = self._asked, self._ask()
        self._end_if(asked)

    def meet(self) -> None:
        """End every rank if any was told to end by now. For places where ranks wait anyway.

        Raises:
            SIGTERMException: as `check`.
        """
        self.check()
        self._end_if(self._asked)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """End this rank in the middle of what is inside if it is told to, or was.

        Of other ranks it must need nothing, and they must hear of it afterwards.

        Raises:
            SIGTERMException: at any place inside.
        """
        self._at_once = True
        try:
            if self.told:
                raise SIGTERMException
            yield
        finally:
            self._at_once = False

    def close(self) -> None:
        """Let Lightning's handlers be registered again by the next run."""
        _callbacks(self._trainer).remove(self)
        for name in (_NOTIFIER, _REQUEUER):
            self._connector.__dict__.pop(name, None)
        self._loop.__dict__.pop(_ASKER, None)

    def _ask(self) -> Question:
        return Question([self.told, self._to_requeue], self._group)

    def _end_if(self, asked: Question | None) -> None:
        if asked is not None and asked.answer()[0]:
            self._connector.received_sigterm = True
        if self._connector.received_sigterm:
            raise SIGTERMException

    def _requeue(self) -> None:
        """Save, and have SLURM start the job again: Lightning's handler, on all ranks at once."""
        handler = getattr(type(self._connector), _REQUEUER)
        with self._saving_at_once():
            handler(self._connector, signal.SIGUSR1, None)

    def _note_end(self, signum: int, frame: Any) -> None:
        if not self.told:
            self.told = True
            self._say(signum, "all ranks end")
            self._tell_others(signum)
        if self._at_once:
            raise SIGTERMException

    def _note_requeue(self, signum: int, frame: Any) -> None:
        if not self._to_requeue:
            self._to_requeue = True
            self._say(signum, "all ranks save and the job is requeued")

    def _tell_others(self, signum: int) -> None:
        """Tell the processes that this one has started as ranks, or the one that has started it."""
        launcher = self._trainer.strategy.launcher
        if launcher is not None:
            launcher.kill(signum)
        if os.environ.get(PARENT) == str(os.getppid()):
            with suppress(ProcessLookupError):
                os.kill(os.getppid(), signum)

    def _say(self, signum: int, what: str) -> None:
        message = f"[rank {self._trainer.global_rank}] {signal.Signals(signum).name}: {what} at"
        # Not by `print`, in the middle of which the signal may have come.
        os.write(2, f"{message} their next step or the one after it\n".encode())


def _callbacks(trainer: pl.Trainer) -> list[Callback]:
    callbacks: list[Callback] = getattr(trainer, "callbacks")  # noqa: B009  set by a connector
    return callbacks


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
    global _watched
    if _watched is not None:
        _watched.set()  # of an earlier run
    done = _watched = threading.Event()
    parent = os.environ.get(PARENT)
    is_ours = parent == str(os.getppid())
    # It may have ended before this process has come here.
    if parent is not None and (is_ours or not _is_running(int(parent))):
        arguments = (int(parent), min(grace, _GRACE), done)
        threading.Thread(target=_watch, args=arguments, daemon=True).start()
    return done


_watched: threading.Event | None = None
"""What ends the watch of this process."""


def _watch(parent: int, grace: float, done: threading.Event) -> None:
    while os.getppid() == parent:
        if done.wait(0.5):
            return
    # Where the other one was done, this one is about to be.
    if not done.wait(grace):
        message = f"process {parent}, which has started this one, ended {grace:.0f} s ago"
        os.write(2, f"{message}: so does this one\n".encode())
        os._exit(1)


def _is_running(process: int) -> bool:
    """One that has ended does not, even if nobody has asked how: what adopts it may never do so."""
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return not Path("/proc/self").exists() and _is_known(process)
    return status.rpartition(")")[2].split()[0] not in "ZX"


def _is_known(process: int) -> bool:
    """Whether there is a process of a number, where the system says no more."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def end_soon_at_exit() -> None:
    """Let this process take no longer than some seconds to exit, once it does.

    For one that has left others in the middle of a collective: what is left of NCCL's communicators
    may wait for them when the interpreter lets go of it. Then no thread of Python's runs any more,
    so that the kernel must end it.
    """
    atexit.unregister(_set_alarm)
    atexit.register(_set_alarm)


def _set_alarm() -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(int(_GRACE))
