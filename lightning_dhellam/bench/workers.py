"""Jobs in processes of their own, one at a time, within a time budget.

A job that crashes, hangs or runs out of memory costs its own row and nothing else. The next
process imports its libraries while a job runs, and touches the device only when it gets one.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

_PR_SET_PDEATHSIG = 1


class Budget:
    """Seconds that may be spent, counted from now."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        """Seconds that are left, never less than 0."""
        return max(0.0, self._end - time.monotonic())


class Workers:
    """Runs jobs of `lightning_dhellam.bench.worker`.

    Args:
        log: file that gets everything that the processes print.
        budget: for all jobs together.
        limit: seconds for one job, from the moment at which it gets its process.
        shortest: seconds below which a job is not begun, because it would get nowhere.
    """

    def __init__(self, log: Path, budget: Budget, limit: float, shortest: float = 15.0) -> None:
        self._budget = budget
        self._limit = limit
        self._shortest = shortest
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log: IO[str] = log.open("a")
        self._next: subprocess.Popen[str] | None = None
        self._folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> Workers:
        self._next = self._start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._next is not None:
            stop(self._next)
        self._log.close()
        self._folder.cleanup()

    def run(self, job: Mapping[str, Any], *, more: bool = True) -> dict[str, Any]:
        """The result of `job`, or `failed` with the reason. `more` says whether another follows."""
        seconds = min(self._limit, self._budget.left)
        if seconds < self._shortest:
            return {"failed": f"not begun: {seconds:.0f} s are left of the budget"}
        process = self._next or self._start()
        self._next = self._start() if more else None
        result = Path(self._folder.name) / f"{process.pid}.json"
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({**job, "result": str(result)}) + "\n")
            process.stdin.close()
            code = process.wait(seconds)
        except BrokenPipeError:  # it is dead already
            code = process.wait()
        except subprocess.TimeoutExpired:
            return {"failed": f"stopped after {seconds:.0f} s"}
        finally:
            stop(process)
        if not result.exists():
            return {"failed": f"its process ended with code {code} and no result"}
        found: dict[str, Any] = json.loads(result.read_text())
        return found

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-u", "-W", "ignore", "-m", "lightning_dhellam.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def stop(process: subprocess.Popen[Any]) -> None:
    """End a process and what it has started, such as compilers."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None and not process.stdin.closed:
        process.stdin.close()


def end_with_parent() -> None:
    """Let Linux kill this process when the one that has started it ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
