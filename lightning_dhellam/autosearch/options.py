"""How a search is to be made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MEMORY_SLACK = 0.025
"""Share of the memory of a step that the slots of a searched plan may take more than those of the
sequential one."""


@dataclass(frozen=True)
class Options:
    """How to search.

    Attributes:
        rounds: steps that each candidate is measured on.
        profile: file that holds the profile, or will.
        memory_limit: bytes that slots take at once in a pair of layers; None for what the
            sequential plan needs and `memory_slack`.
        memory_slack: share of the memory of a step.
        plans: whether plans are searched; or else the given one stays.
        schedules: whether schedules of the pipeline are.
    """

    rounds: int = 5
    profile: Path | None = None
    memory_limit: float | None = None
    memory_slack: float = MEMORY_SLACK
    plans: bool = True
    schedules: bool = False
