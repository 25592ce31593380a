"""Processes that end with the benchmark that has started them, and the time that they may take."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

_PR_SET_PDEATHSIG = 1
_STARTER = "DHELLAM_STARTER"


class Budget:
    """Seconds that may be spent, counted from when this was made."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds that are left, never less than 0."""
        return max(0.0, self._end - time.monotonic())


def stop(process: subprocess.Popen[Any]) -> None:
    """End a process and what it has started, such as compilers. It leads a session of its own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None and not process.stdin.closed:
        process.stdin.close()


def of_this() -> dict[str, str]:
    """What is added to the environment of what this process starts, to know it by."""
    return {_STARTER: str(os.getpid())}


def end_with_parent() -> None:
    """Let Linux kill this process when the one that has started it ends, however it ends.

    It ends at once if that one, named by `of_this` in its environment, ended while this one was
    still importing.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    starter = os.environ.pop(_STARTER, None)
    if starter is not None and os.getppid() != int(starter):
        os._exit(1)
