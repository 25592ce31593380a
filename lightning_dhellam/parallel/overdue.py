"""Ends a process whose device waits longer for another one than the timeout of its groups.

What copy engines bring is awaited by a kernel, for ever: no library looks after it, as NCCL's does
after its own. `presence.py` ends a process within half a minute where another was lost, whatever
its device waits for, and is there under the strategy. What is left is a rank that is there and does
not come, and runs without a strategy. So a thread of the host looks at what has been issued:

    host     issues 0  issues 1  issues 2  ...
    device   0 ends | 1 waits ................ for as long as the timeout: the process ends

torch's signals know a timeout of their own. It is not used: the kernel would trap, so that whatever
the host does next fails with an "unspecified launch failure" that names neither edge nor rank, and
nothing on that device can be saved any more.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch

_OFTEN, _LEAST = 1.0, 0.1
"""Seconds between two looks, at most; as a share of the timeout, if that is less."""


@dataclass
class _Awaited:
    """What was issued.

    Attributes:
        whom: it is awaited from, in words.
        since: when it was issued, by the host's clock.
        is_over: whether the device is done with it.
    """

    whom: str
    since: float
    is_over: Callable[[], bool] = lambda: False


class Overdue:
    """Knows for how long a device has waited on each way that something comes or goes.

    Args:
        timeout: after which the process ends.
        who: this process, in words.
        remedy: what else a user may do.
        end: what is done with what is to be said.
    """

    def __init__(
        self,
        timeout: timedelta,
        who: str,
        remedy: str = "",
        end: Callable[[str], None] | None = None,
    ) -> None:
        self._timeout = timeout
        self._who = who
        self._remedy = remedy
        self._end = end or _end
        self._lock = threading.Lock()
        self._ways: dict[str, deque[_Awaited]] = {}
        self._moved: dict[str, float] = {}
        self._thread: threading.Thread | None = None

    @contextmanager
    def watching(self, way: str, whom: str, device: torch.device) -> Iterator[None]:
        """Look after what is issued inside, on the stream that is current.

        Args:
            way: on which one thing comes after the other, such as an edge.
            whom: it is awaited from.
            device: that the stream is of.
        """
        awaited = _Awaited(whom, time.monotonic())
        with self._lock:
            waiting = self._ways.setdefault(way, deque())
            self._forget(way, awaited.since)
            waiting.append(awaited)
            if self._thread is None:
                self._thread = threading.Thread(target=self._look, name="overdue", daemon=True)
                self._thread.start()
        try:
            yield
        except BaseException:
            awaited.is_over = _at_once
            raise
        if device.type != "cuda":
            awaited.is_over = _at_once
            return
        event = torch.cuda.Event()
        event.record()
        awaited.is_over = event.query

    def said(self, now: float) -> str | None:
        """What there is to say at a moment of the host's clock; None while nothing is overdue."""
        late: dict[str, float] = {}
        with self._lock:
            for way, waiting in self._ways.items():
                self._forget(way, now)
                if waiting:
                    late[way] = now - max(waiting[0].since, self._moved.get(way, 0.0))
            way = max(late, key=late.__getitem__, default="")
            if not late or late[way] <= self._timeout.total_seconds():
                return None
            whom = self._ways[way][0].whom
        return (
            f"{self._who} has waited {late[way]:.0f} s for {whom} on {way}, longer than the timeout"
            f" of {self._timeout} allows, and ends: see what {whom} does or has said; give a longer"
            f" timeout if it may take so long{self._remedy}"
        )

    def _forget(self, way: str, now: float) -> None:
        """Forget what is over. What is behind it has not waited before."""
        waiting = self._ways[way]
        while waiting and waiting[0].is_over():
            waiting.popleft()
            self._moved[way] = now

    def _look(self) -> None:
        while True:
            time.sleep(min(_OFTEN, _LEAST * self._timeout.total_seconds()))
            try:
                text = self.said(time.monotonic())
            except RuntimeError:  # of the device, which others will say
                text = None
                with self._lock:
                    self._ways.clear()
            if text is not None:
                self._end(text)
                return
            with self._lock:
                if not any(self._ways.values()):
                    self._thread = None
                    return


def _at_once() -> bool:
    return True


def _end(text: str) -> None:
    # Not by `print`: the main thread may hold its lock, and waits.
    os.write(2, f"{text}\n".encode())
    os._exit(1)
