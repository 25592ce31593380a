"""Jobs in processes of their own, one at a time, within a time budget.

A job that crashes, hangs or runs out of memory costs its own row and nothing else. The next
process imports its libraries while a job runs, and touches the device only when it gets one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from lightning_dhellam.bench.processes import Budget, of_this, stop
from lightning_dhellam.bench.throughput.settings import Job

_WORKER = "lightning_dhellam.bench.throughput.worker"


def stage_of(result: Path) -> Path:
    """The file that says how far a job is whose `result` will be in that file."""
    return result.with_suffix(".stage")


class Workers:
    """Runs jobs one after the other, each in a process that does nothing else.

    Args:
        log: File that gets everything that the processes print.
        budget: Time for all jobs together.
        limit: Seconds for one job, from the moment at which it gets its process.
        shortest: Seconds below which a job is not begun, because it would get nowhere.
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

    def run(self, job: Job, *, more: bool = True) -> dict[str, Any]:
        """The result of `job`, or `failed` with the reason. `more` says whether another follows."""
        seconds = min(self._limit, self._budget.left)
        if seconds < self._shortest:
            return {"failed": f"not begun: {seconds:.0f} s are left of the budget"}
        process = self._next or self._start()
        self._next = self._start() if more else None
        result = Path(self._folder.name) / f"{process.pid}.json"
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({"job": asdict(job), "result": str(result)}) + "\n")
            process.stdin.close()
            code = process.wait(seconds)
        except BrokenPipeError:  # it is dead already
            code = process.wait()
        except subprocess.TimeoutExpired:
            stage = stage_of(result)
            how_far = f" {stage.read_text()}" if stage.exists() else ""
            return {"failed": f"stopped after {seconds:.0f} s{how_far}"}
        finally:
            stop(process)
        if not result.exists():
            return {"failed": f"its process ended with code {code} and no result"}
        found: dict[str, Any] = json.loads(result.read_text())
        return found

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-u", "-W", "ignore", "-m", _WORKER],
            env=os.environ | of_this(),
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
