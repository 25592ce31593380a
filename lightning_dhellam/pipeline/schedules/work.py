"""What a stage does at a time: works, alone or two together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from lightning_dhellam.plan.operator import Strand


class ScheduleError(ValueError):
    """A schedule that is not defined for these numbers, or that cannot be carried out."""


class Part(StrEnum):
    """A part of the work of a chunk for a micro-batch.

    `B` is the whole backward; `I` and `W` are its two halves, the gradient of the input and those
    of the weights, of a schedule that separates them.
    """

    FORWARD = "F"
    BACKWARD = "B"
    INPUT = "I"
    WEIGHT = "W"


_WORK = re.compile(r"(\d+)([FBIW])(\d+)")


@dataclass(frozen=True, slots=True)
class Work:
    """One part of the work of a chunk for one micro-batch, printed as `0F2`."""

    chunk: int
    part: Part
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.chunk}{self.part}{self.micro_batch}"

    @property
    def strand(self) -> Strand:
        """The strand of the work: which way its micro-batch goes."""
        return Strand.FORWARD if self.part is Part.FORWARD else Strand.BACKWARD

    @property
    def step(self) -> int:
        """How many chunks on its result is needed: 1 of a forward, -1 of a backward, 0 of a W."""
        return _STEPS[self.part]

    @classmethod
    def parse(cls, text: str) -> Work:
        """Read a work from its own print. Raises ScheduleError."""
        match = _WORK.fullmatch(text)
        if match is None:
            raise ScheduleError(f"'{text}' is no work: expected CHUNK, F, B, I or W, MICRO-BATCH")
        return cls(int(match[1]), Part(match[2]), int(match[3]))


_STEPS = {Part.FORWARD: 1, Part.BACKWARD: -1, Part.INPUT: -1, Part.WEIGHT: 0}

Visit = tuple[Work, ...]
"""What a stage carries out at a time: one work, or a forward beside a backward."""


def one(chunk: int, part: Part, micro_batch: int) -> Visit:
    """Make a visit of a single work."""
    return (Work(chunk, part, micro_batch),)


def shown(works: Sequence[Work]) -> str:
    """Print a visit: its works, joined by `+`."""
    return "+".join(map(str, works))


def done_as(work: Work) -> Work:
    """Return the name under which others wait for `work`: `I`, if it is a whole backward."""
    if work.part is Part.BACKWARD:
        return Work(work.chunk, Part.INPUT, work.micro_batch)
    return work


LIVE = {Part.FORWARD: 1, Part.BACKWARD: -1, Part.INPUT: 0, Part.WEIGHT: -1}
"""What a work adds to the chunks of micro-batches whose activations a stage holds. The first half
of backward frees nothing: what the second still needs is nearly all of it (arXiv 2401.10241,
table 1)."""


def live_activations(visits: Sequence[Visit]) -> list[int]:
    """Count the chunks of micro-batches that a stage holds activations of, after each visit.

    While a visit runs, its forward fills what its backward frees, so that the stage holds at most
    one more than before the visit.
    """
    live = 0
    counts = []
    for works in visits:
        live += sum(LIVE[work.part] for work in works)
        counts.append(live)
    return counts


def peak_activations(visits: Sequence[Visit]) -> int:
    """Count the most chunks of micro-batches whose activations a stage holds while a visit runs.

    In the fold with M ≥ 2P it is 2P+1 on every stage: chunk s is held while 2P-s micro-batches
    pass, chunk 2P-1-s while s+1 do. Each is 1/(2P) of the model, so a stage holds about what it
    would for one micro-batch through the whole model.
    """
    before = [0, *live_activations(visits)[:-1]]
    rises = (any(work.part is Part.FORWARD for work in works) for works in visits)
    return max(live + rise for live, rise in zip(before, rises, strict=True))
