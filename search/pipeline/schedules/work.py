"""What the stages of a pipeline do, as data. A schedule prints as a table of rows like

    stage 0   0F0  0F1  0F2+3B0  3B1
    stage 1   1F0  2F0  1F1+2B0  ...

where `0F2` is chunk 0, forward, micro-batch 2, and `+` joins the two strands of one visit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

from lightning_dhellam.plan import Strand


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

    @classmethod
    def parse(cls, text: str) -> Work:
        """Read a work from its own print. Raises ScheduleError."""
        match = _WORK.fullmatch(text)
        if match is None:
            raise ScheduleError(f"'{text}' is no work: expected CHUNK, F, B, I or W, MICRO-BATCH")
        return cls(int(match[1]), Part(match[2]), int(match[3]))


Visit = tuple[Work, ...]
"""What a stage carries out at a time: one work, or a forward beside a backward."""


def one(chunk: int, part: Part, micro_batch: int) -> Visit:
    """Make a visit of a single work."""
    return (Work(chunk, part, micro_batch),)


@dataclass(frozen=True)
class Schedule:
    """The visits of every stage in one training step.

    Attributes:
        name: name of the scheme.
        micro_batches: how many micro-batches the step has.
        stage_of: stage that holds each chunk; forward goes through the chunks in order.
        visits: visits of each stage, in order.
    """

    name: str
    micro_batches: int
    stage_of: tuple[int, ...]
    visits: tuple[tuple[Visit, ...], ...]

    @property
    def stages(self) -> int:
        """How many stages there are."""
        return len(self.visits)

    @property
    def chunks(self) -> int:
        """How many chunks the layers are cut into."""
        return len(self.stage_of)

    def before(self, work: Work) -> Iterator[Work]:
        """Give what must be done before `work`; a backward that is waited for is spelt `I`."""
        chunk, k = work.chunk, work.micro_batch
        if work.part is Part.WEIGHT:
            yield Work(chunk, Part.INPUT, k)
        elif work.part is Part.FORWARD:
            if chunk:
                yield Work(chunk - 1, Part.FORWARD, k)
        else:
            yield Work(chunk, Part.FORWARD, k)
            if chunk + 1 < self.chunks:
                yield Work(chunk + 1, Part.INPUT, k)

    def sent_to(self, work: Work) -> int | None:
        """Return the other stage that the result of `work` goes to, None if it stays."""
        step = {Part.FORWARD: 1, Part.BACKWARD: -1, Part.INPUT: -1, Part.WEIGHT: 0}[work.part]
        following = work.chunk + step
        if not step or not 0 <= following < self.chunks:
            return None
        stage = self.stage_of[following]
        return None if stage == self.stage_of[work.chunk] else stage

    def __str__(self) -> str:
        """Print a row of visits for each stage."""
        texts = [["+".join(map(str, work)) for work in row] for row in self.visits]
        width = max((len(text) for row in texts for text in row), default=0)
        lines = [
            f"stage {stage}  " + " ".join(text.ljust(width) for text in row).rstrip()
            for stage, row in enumerate(texts)
        ]
        return "\n".join([f"schedule {self.name}", *lines])


def done_as(work: Work) -> Work:
    """Return the name under which others wait for `work`: `I`, if it is a whole backward."""
    if work.part is Part.BACKWARD:
        return Work(work.chunk, Part.INPUT, work.micro_batch)
    return work


def joined(schedule: Schedule) -> Schedule:
    """Return a schedule whose halves of a backward that follow each other are one whole backward.

    The whole can hide the communication of its first half under its second; the halves can send
    the gradient of the input earlier.
    """
    rows = []
    for row in schedule.visits:
        new: list[Visit] = []
        for works in row:
            last = new[-1] if new else ()
            if len(works) == 1 and works[0].part is Part.WEIGHT and last == _first_half(works[0]):
                new[-1] = one(works[0].chunk, Part.BACKWARD, works[0].micro_batch)
            else:
                new.append(works)
        rows.append(tuple(new))
    return replace(schedule, visits=tuple(rows))


def _first_half(work: Work) -> Visit:
    return one(work.chunk, Part.INPUT, work.micro_batch)
