"""Which processes of a group still run."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def is_running(group: int) -> bool:
    """Whether a process of the group runs. One that has ended, and that nobody has asked about yet,
    does not: what adopts orphans may take its time."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            state, _, own = stat.read_text().rpartition(")")[2].split()[:3]
            if int(own) == group and state not in "ZX":
                return True
    return False
