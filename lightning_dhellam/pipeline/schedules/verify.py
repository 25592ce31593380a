"""Proof on paper that a schedule can run: nothing lost, nothing twice, in order, no deadlock.

A stage walks its visits in order. What waits for what:

    end of a walk → start of the next              a stage walks one at a time
    end of a walk → end of the one it sends to     nothing runs before all its tensors are there
    start of a walk → receives of the next         they are posted one walk ahead
    receive → start of the walk some walks after   a sender wants its memory back, whose transfer
    the one that sends                             needs the receive (`sends_ahead`)

Receives match sends by their order, as communicators know no tags; each strand has a communicator
of its own between two stages. Where everything gets to its end, it does so whatever the times are.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from lightning_dhellam.pipeline.schedules.schedule import Schedule
from lightning_dhellam.pipeline.schedules.walks import Walk, walks
from lightning_dhellam.pipeline.schedules.work import Part, Work, done_as, shown

POSTED_AHEAD = 1
"""Walks between the posting of a receive and the walk that needs it."""

_WHOLE = ({Part.FORWARD: 1, Part.BACKWARD: 1}, {Part.FORWARD: 1, Part.INPUT: 1, Part.WEIGHT: 1})
_ORDERED = {
    "forward": (Part.FORWARD,),
    "backward": (Part.BACKWARD, Part.INPUT),
    "to the gradients of weights": (Part.BACKWARD, Part.WEIGHT),
}


def verify(schedule: Schedule) -> None:
    """Prove that every micro-batch passes every chunk, in order, and that nothing waits for ever.

    Without a single backward the schedule is that of a step that goes forward only.

    Raises:
        ScheduleError: the schedule with an arrow at the row that cannot be.
    """
    _check_placed(schedule)
    _check_whole(schedule)
    _check_in_order(schedule)
    _check_alive(schedule)
    _check_matched(schedule)


def _check_placed(schedule: Schedule) -> None:
    """Check that every visit is of a stage's own chunks, and one that the engine can carry out."""
    placement = schedule.placement
    if sorted({*placement.stage_of}) != list(range(schedule.stages)):
        raise schedule.error(-1, f"every one of {schedule.stages} stages needs a chunk")
    for stage, row in enumerate(schedule.visits):
        for works in row:
            strands = Counter(work.strand for work in works)
            if not works or max(strands.values()) > 1:
                remark = (
                    f"a visit is one work, or a forward beside a backward, not '{shown(works)}'"
                )
                raise schedule.error(stage, remark)
            for work in works:
                if work.chunk >= placement.chunks or work.micro_batch >= schedule.micro_batches:
                    raise schedule.error(
                        stage,
                        f"{work}, but there are {placement.chunks} chunks and"
                        f" {schedule.micro_batches} micro-batches",
                    )
                if placement.stage_of[work.chunk] != stage:
                    holds = placement.stage_of[work.chunk]
                    raise schedule.error(
                        stage, f"{work}, but stage {holds} holds chunk {work.chunk}"
                    )


def _check_whole(schedule: Schedule) -> None:
    """Check that every chunk meets every micro-batch once each way."""
    seen: dict[tuple[int, int], Counter[Part]] = defaultdict(Counter)
    for work in schedule.works:
        seen[work.chunk, work.micro_batch][work.part] += 1
    forward_only = all(set(parts) == {Part.FORWARD} for parts in seen.values())
    whole = ({Part.FORWARD: 1},) if forward_only else _WHOLE
    for chunk, stage in enumerate(schedule.placement.stage_of):
        for k in range(schedule.micro_batches):
            found = dict(seen[chunk, k])
            if found not in whole:
                parts = ", ".join(f"{part} {n} times" for part, n in found.items()) or "nothing"
                raise schedule.error(
                    stage,
                    f"{parts} of chunk {chunk} for micro-batch {k}: once forward and once backward"
                    " is right",
                )


def _check_in_order(schedule: Schedule) -> None:
    """Check that every chunk takes the micro-batches in order, each way.

    In which order gradients are added decides on their last bits, and what layers remember of what
    they have seen depends on it too.
    """
    for stage, row in enumerate(schedule.visits):
        last: dict[tuple[int, str], int] = defaultdict(lambda: -1)
        for work in (work for works in row for work in works):
            for way, parts in _ORDERED.items():
                if work.part not in parts:
                    continue
                if work.micro_batch < last[work.chunk, way]:
                    raise schedule.error(
                        stage,
                        f"{work} comes after micro-batch {last[work.chunk, way]} on its way {way}:"
                        " a chunk takes them in order",
                    )
                last[work.chunk, way] = work.micro_batch


def _check_matched(schedule: Schedule) -> None:
    """Check that on every edge messages are received in the order in which they are sent."""
    sent, received = schedule.messages()
    for edge in sorted(sent.keys() | received.keys()):
        out, into = sent[edge], received[edge]
        at = next((i for i, (a, b) in enumerate(zip(out, into, strict=True)) if a != b), None)
        if at is not None:
            raise schedule.error(
                edge.target,
                f"message {at} of edge {edge} is {out[at]}, but {into[at]} is received: sends and"
                " receives must be in one order",
            )


def _check_alive(schedule: Schedule) -> None:
    """Let the stages go as far as they come. Whoever is left waits for ever."""
    rows, done = _rows(schedule), set[Work]()
    while sum(row.advance(done) for row in rows):
        pass
    for row in rows:
        if not row.finished:
            visit = sum(map(len, row.walks[: row.ended]))
            missing = ", ".join(map(str, row.missing(done)))
            raise schedule.error(
                row.stage,
                f"deadlock: waits at visit {visit}, '{shown(row.walks[row.ended][0])}', for"
                f" {missing}, which nobody can reach",
            )


@lru_cache(maxsize=256)
def sends_ahead(schedule: Schedule) -> int:
    """Return after how many walks a sender may wait for its transfers, whose memory it wants back.

    Where visits take equally long no stage is then held up by a receive that is not posted. Nor
    does any wait for ever, whatever the times are: two that begin walks at the same moment, each
    after a receive that the other posts in its own, would. It is at least 2.
    """
    ahead = _ahead_in_step(schedule)
    while not _goes_through(schedule, ahead):
        ahead += 1
    return ahead


def _ahead_in_step(schedule: Schedule) -> int:
    """After how many walks a sender may wait where all visits take equally long."""
    rows = _rows(schedule)
    receivers = _receivers(rows)
    done, sent, most = set[Work](), list[tuple[_Row, int, Work]](), 2
    while not all(row.finished for row in rows):
        for row, number in [(row, row.ended) for row in rows if row.spend(done)]:
            row.ended += 1
            for work in _works(row.walks[number]):
                done.add(done_as(work))
                if schedule.sent_to(work) is not None:
                    sent.append((row, number, done_as(work)))
        sent = [message for message in sent if not _is_posted(*receivers[message[2]])]
        most = max(most, *(row.ended - number + 1 for row, number, _ in sent), 0)
    return most


def _goes_through(schedule: Schedule, ahead: int) -> bool:
    """Whether stages get to their ends that wait for what they have sent `ahead` walks before."""
    rows, done = _rows(schedule), set[Work]()
    receivers = _receivers(rows)
    sent = {
        (row.stage, number): [
            receivers[done_as(work)] for work in _works(walk) if schedule.sent_to(work) is not None
        ]
        for row in rows
        for number, walk in enumerate(row.walks)
    }
    begun = [0] * len(rows)

    def may_begin(row: _Row) -> bool:
        """Before a walk it waits for the sends of one more; those before have been waited for."""
        waited = sent.get((row.stage, row.ended - ahead), [])
        return all(number - POSTED_AHEAD < begun[other.stage] for other, number in waited)

    moved = True
    while moved:
        moved = False
        for row in rows:
            while not row.finished:
                if begun[row.stage] == row.ended:
                    if not may_begin(row):
                        break
                    begun[row.stage] += 1
                elif row.missing(done):
                    break
                else:
                    done.update(done_as(work) for work in _works(row.walks[row.ended]))
                    row.ended += 1
                moved = True
    return all(row.finished for row in rows)


def _receivers(rows: list[_Row]) -> dict[Work, tuple[_Row, int]]:
    """Who receives the result of a work, and for which of his walks."""
    return {
        work: (row, number)
        for row in rows
        for number, walk in enumerate(row.walks)
        for work in row.received(walk)
    }


def _is_posted(row: _Row, number: int) -> bool:
    """Whether a stage has begun the walk before the one of this number."""
    return number - POSTED_AHEAD <= row.ended


def _rows(schedule: Schedule) -> list[_Row]:
    return [_Row(stage, walks(row), schedule) for stage, row in enumerate(schedule.visits)]


@dataclass
class _Row:
    """How far a stage has come.

    Attributes:
        stage: its number.
        walks: what it carries out.
        schedule: of all stages.
        ended: how many walks have ended. The one after them has begun.
        worked: how many of its visits are over.
    """

    stage: int
    walks: list[Walk]
    schedule: Schedule
    ended: int = 0
    worked: int = 0

    @property
    def finished(self) -> bool:
        return self.ended == len(self.walks)

    def received(self, walk: Walk) -> Iterator[Work]:
        """Give what a walk needs of other stages."""
        stage_of = self.schedule.placement.stage_of
        needed = (before for work in _works(walk) for before in self.schedule.before(work))
        return (before for before in needed if stage_of[before.chunk] != self.stage)

    def advance(self, done: set[Work]) -> int:
        """End all walks that can be by now, and return how many there were."""
        first = self.ended
        while not self.finished and not self.missing(done):
            done.update(done_as(work) for work in _works(self.walks[self.ended]))
            self.ended += 1
        return self.ended - first

    def spend(self, done: set[Work]) -> bool:
        """Spend the time of a visit, if it can run. Returns whether a walk ends with it."""
        if self.finished or self.missing(done):
            return False
        self.worked = (self.worked + 1) % len(self.walks[self.ended])
        return not self.worked

    def missing(self, done: set[Work]) -> list[Work]:
        """What the walk that has begun needs, and nobody has done."""
        missing, own = [], set[Work]()
        for works in self.walks[self.ended]:
            needed = (before for work in works for before in self.schedule.before(work))
            missing += [before for before in needed if before not in done and before not in own]
            own |= {done_as(work) for work in works}
        return missing


def _works(walk: Walk) -> Iterator[Work]:
    return (work for works in walk for work in works)
