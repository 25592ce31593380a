"""Writes checkpoints beside training: one at a time, and never in silence.

    main thread   step 3, save A: stage | step 4 |  step 5   | step 6: all ranks are done
    background                     write A | agree | rename A |

Ranks agree in the background, in a group of their own, that all have written; then the first one
renames. So the result is the same on all of them, but they may see it at different steps. Hence at
each step's start they ask each other whether all have, and read the answer at the next one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta

import torch
from torch.distributed import ProcessGroup

from lightning_dhellam.checkpoint.staging import Staging
from lightning_dhellam.checkpoint.writing import Prepared, write
from lightning_dhellam.files import WriteError
from lightning_dhellam.parallel.context import ParallelContext
from lightning_dhellam.parallel.groups import group_of_hosts
from lightning_dhellam.parallel.hosts import Question, ReduceOp
from lightning_dhellam.parallel.presence import Presence
from lightning_dhellam.remote import Folder

_LOOK, _PATIENCE = 0.5, 3.0
"""Seconds after which a rank looks whether all are there, and in which one that is lost may still
have ended well."""


class Background:
    """What is written while training goes on. Every rank must call its methods at the same places.

    Args:
        device: that trains.
        group: of all ranks, for values in host memory; None where there are no others.
        own_group: the same ranks, which nothing else uses.
        presence: of the same ranks.
    """

    def __init__(
        self,
        device: torch.device,
        group: ProcessGroup | None,
        own_group: ProcessGroup | None,
        presence: Presence | None = None,
    ) -> None:
        self._group = group
        self._presence = presence
        self._own_group = own_group
        self._staging = Staging(device)
        self._job: _Job | None = None
        self._asked: Question | None = None

    @property
    def path(self) -> Folder | None:
        """What is in flight, as far as ranks have agreed."""
        return None if self._job is None else self._job.path

    def start(self, prepared: Prepared) -> None:
        """Copy what is to be written, and begin to write it. Nothing else may be in flight."""
        assert self._job is None
        prepared.stage(self._staging)
        self._job = _Job(prepared, self._staging, self._own_group, self._presence)

    def hold(self) -> None:
        """For the end of a step: let the device change nothing that is still being copied."""
        if self._job is not None:
            self._staging.hold()

    def check(self) -> None:
        """At the start of each step: raise what has failed. It waits for no rank's disk.

        Raises:
            WriteError: on all ranks in the same step.
        """
        asked, self._asked = self._asked, None
        if self._job is None:
            return
        if self._group is None:
            if self._job.done:
                self.finish()
        elif asked is not None and asked.answer()[0]:
            self.finish()
        else:
            self._asked = Question([self._job.done], self._group, ReduceOp.MIN)

    def finish(self) -> None:
        """Wait for what is in flight.

        Raises:
            WriteError: it has failed, on all ranks.
        """
        # What the others are asked may still come here.
        asked, self._asked = self._asked, None
        if asked is not None:
            asked.answer()
        job, self._job = self._job, None
        if job is not None:
            job.finish()

    def settle(self) -> Exception | None:
        """Wait for what is in flight, on a rank that may be alone. What has failed, if it has."""
        job, self._job = self._job, None
        try:
            if job is not None:
                job.finish()
        except Exception as error:
            return error
        return None

    def then(self, action: Callable[[], None]) -> None:
        """Do something once what is in flight has its name; not at all if it never gets it."""
        if self._job is None:
            action()
        else:
            self._job.then(action)

    def close(self) -> None:
        """Give the host memory back, when nothing is in flight."""
        self._staging.close()


_opened: tuple[ProcessGroup, ProcessGroup] | None = None
"""A group of hosts, and the one of the same ranks that was opened for it."""


def group_beside(context: ParallelContext, timeout: timedelta) -> ProcessGroup | None:
    """The ranks of a context, for what is written beside training. Every rank must call this.

    Contexts that take over each other's groups share it.
    """
    global _opened
    if context.host_group is None:
        return None
    if _opened is None or _opened[0] is not context.host_group:
        found = group_of_hosts(context.topology, timeout)
        assert found is not None
        _opened = context.host_group, found
    return _opened[1]


class _Job:
    """A checkpoint in flight. Attributes: its path, and whether it is done, well or not."""

    def __init__(
        self,
        prepared: Prepared,
        staging: Staging,
        group: ProcessGroup | None,
        presence: Presence | None,
    ) -> None:
        self.path = prepared.path
        self._presence = presence
        self._prepared: Prepared | None = prepared
        self._staging = staging
        self._group = group
        self._actions: list[Callable[[], None]] = []
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self.done = False
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        assert self._prepared is not None
        try:
            self._staging.wait()
            write(self._prepared, self._group)
        except Exception as error:
            self._error = error
        self._prepared = None
        while True:
            with self._lock:
                if not self._actions or self._error is not None:
                    self.done = True
                    return
                action = self._actions.pop(0)
            try:
                action()
            except Exception as error:
                self._error = error

    def then(self, action: Callable[[], None]) -> None:
        with self._lock:
            if not self.done:
                self._actions.append(action)
                return
        if self._error is None:
            action()

    def finish(self) -> None:
        # Another rank's thread may have lost the same one and ended, when that rank waits for this
        # one in a step: so nobody would end.
        while self._thread.is_alive():
            self._thread.join(_LOOK)
            if self._thread.is_alive() and self._presence and self._presence.has_lost(_PATIENCE):
                raise WriteError(
                    f"checkpoint {self.path} was not written: this rank has lost"
                    f" {self._presence.lost}"
                )
        if self._error is not None:
            raise self._error
