"""The works of every stage in one step, as data. A schedule prints, and parses back from its print:

    schedule fold: 4 micro-batches, chunks on stages 0 1 1 0
    stage 0  0F0 0F1 3F0 0F2+3B0 3F1 ...
    stage 1  1F0 2F0 1F1 2F1 1F2+2B0 ...

where `0F2` is chunk 0, forward, micro-batch 2, and `+` joins the two strands of one visit.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lightning_dhellam.pipeline.schedules.work import (
    Part,
    ScheduleError,
    Visit,
    Work,
    done_as,
    one,
    shown,
)
from lightning_dhellam.plan.placement import Edge, Placement

_HEADER = re.compile(r"schedule (\S+): (\d+) micro-batch(?:es)?, chunks on stages (\d+(?: \d+)*)")
_ROW = re.compile(r"stage (\d+)((?: +\S+)*)")


@dataclass(frozen=True)
class Schedule:
    """The visits of every stage in one step.

    Attributes:
        name: name of the scheme.
        micro_batches: how many micro-batches the step has.
        placement: which stage holds each chunk.
        visits: visits of each stage, in order.
    """

    name: str
    micro_batches: int
    placement: Placement
    visits: tuple[tuple[Visit, ...], ...]

    @property
    def stages(self) -> int:
        """How many stages there are."""
        return len(self.visits)

    @property
    def chunks(self) -> int:
        """How many chunks the layers are cut into."""
        return self.placement.chunks

    @cached_property
    def micro_batches_of(self) -> NDArray[np.int64]:
        """The micro-batches of the works of every visit, stage by stage; -1 of no second work."""
        rows = [
            (works[0].micro_batch, works[1].micro_batch if len(works) > 1 else -1)
            for row in self.visits
            for works in row
        ]
        return np.array(rows, np.int64).reshape(-1, 2)

    @cached_property
    def kinds(self) -> tuple[tuple[Visit, ...], NDArray[np.int64]]:
        """One visit of each kind, by chunks and parts, and of every visit, stage by stage, the
        number of its kind."""
        found: dict[tuple[tuple[int, Part], ...], int] = {}
        ones: list[Visit] = []
        numbers = []
        for works in (works for row in self.visits for works in row):
            key = tuple([(work.chunk, work.part) for work in works])
            if key not in found:
                found[key] = len(ones)
                ones.append(works)
            numbers.append(found[key])
        return tuple(ones), np.array(numbers, np.int64)

    @property
    def works(self) -> Iterator[Work]:
        """Every work of the step, stage by stage."""
        return (work for row in self.visits for works in row for work in works)

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
        following = work.chunk + work.step
        if not work.step or not 0 <= following < self.chunks:
            return None
        stage = self.placement.stage_of[following]
        return None if stage == self.placement.stage_of[work.chunk] else stage

    def messages(self) -> tuple[dict[Edge, list[Work]], dict[Edge, list[Work]]]:
        """Return the results that each edge carries, in order of sending and of receiving."""
        sent: dict[Edge, list[Work]] = defaultdict(list)
        received: dict[Edge, list[Work]] = defaultdict(list)
        for stage, row in enumerate(self.visits):
            for work in (work for works in row for work in works):
                for before in self.before(work):
                    source = self.placement.stage_of[before.chunk]
                    if source != stage:
                        received[Edge(source, stage, before.strand)].append(before)
                target = self.sent_to(work)
                if target is not None:
                    sent[Edge(stage, target, work.strand)].append(done_as(work))
        return sent, received

    def forward_only(self) -> Schedule:
        """Return the schedule without what goes backward, for a step that evaluates."""
        return self._without(lambda work: work.part is not Part.FORWARD)

    def of_first(self, micro_batches: int) -> Schedule:
        """Return the schedule of the first so many micro-batches, as if the others did nothing."""
        if micro_batches >= self.micro_batches:
            return self
        first = self._without(lambda work: work.micro_batch >= micro_batches)
        return replace(first, micro_batches=micro_batches)

    def _without(self, missing: Callable[[Work], bool]) -> Schedule:
        rows = (
            (tuple(work for work in works if not missing(work)) for works in row)
            for row in self.visits
        )
        return replace(self, visits=tuple(tuple(works for works in row if works) for row in rows))

    def joined(self) -> Schedule:
        """Return a schedule whose halves of a backward that follow each other are one backward.

        The whole can hide the communication of its first half under its second; the halves can
        send the gradient of the input earlier.
        """
        return replace(self, visits=tuple(tuple(_joined(row)) for row in self.visits))

    def __str__(self) -> str:
        return self.table()

    def table(self, arrow_at: int | None = None, remark: str = "") -> str:
        """The schedule as text, with an arrow and a remark at the row of stage `arrow_at`.

        -1 is the header.
        """
        texts = [[shown(works) for works in row] for row in self.visits]
        width = max((len(text) for row in texts for text in row), default=0)
        number = self.micro_batches
        header = (
            f"schedule {self.name}: {number} micro-batch{'es' * (number != 1)}, chunks on stages"
            f" {self.placement}"
        )
        rows = [
            f"stage {stage}  {' '.join(text.ljust(width) for text in row)}".rstrip()
            for stage, row in enumerate(texts)
        ]
        return _marked([header, *rows], None if arrow_at is None else arrow_at + 1, remark)

    def error(self, stage: int, remark: str) -> ScheduleError:
        """An error about the row of a stage; -1 is the header."""
        return ScheduleError(f"invalid schedule: {remark}\n{self.table(stage, remark)}")

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read a schedule from its own print.

        Raises:
            ScheduleError: with an arrow at the bad line.
        """
        lines = [line.strip() for line in text.strip().splitlines()] or ["(empty text)"]
        header = _HEADER.fullmatch(lines[0])
        if header is None:
            expected = "expected 'schedule NAME: M micro-batches, chunks on stages 0 1 …'"
            raise _parse_error(lines, 0, expected)
        placement = Placement(tuple(map(int, header[3].split())))
        rows = [_parse_row(lines, index) for index in range(1, len(lines))]
        if len(rows) != placement.stages:
            remark = f"{len(rows)} rows for {placement.stages} stages"
            raise _parse_error(lines, 0, remark)
        return cls(header[1], int(header[2]), placement, tuple(rows))


def _joined(row: Sequence[Visit]) -> list[Visit]:
    new: list[Visit] = []
    for works in row:
        work = works[0]
        first_half = one(work.chunk, Part.INPUT, work.micro_batch)
        if works == one(work.chunk, Part.WEIGHT, work.micro_batch) and new[-1:] == [first_half]:
            new[-1] = one(work.chunk, Part.BACKWARD, work.micro_batch)
        else:
            new.append(works)
    return new


def _parse_row(lines: list[str], index: int) -> tuple[Visit, ...]:
    row = _ROW.fullmatch(lines[index])
    if row is None or int(row[1]) != index - 1:
        raise _parse_error(lines, index, f"expected 'stage {index - 1}' and its visits")
    try:
        return tuple(tuple(map(Work.parse, visit.split("+"))) for visit in row[2].split())
    except ScheduleError as error:
        raise _parse_error(lines, index, str(error)) from None


def _parse_error(lines: list[str], index: int, remark: str) -> ScheduleError:
    return ScheduleError(f"not a schedule: {remark}\n{_marked(lines, index, remark)}")


def _marked(lines: Sequence[str], at: int | None, remark: str) -> str:
    arrow = f"   <-- {remark}"
    return "\n".join(line + arrow * (index == at) for index, line in enumerate(lines))
