"""Proves that a schedule can be carried out: nothing lost, nothing twice, no deadlock."""

from __future__ import annotations

from collections import Counter, defaultdict

from lightning_dhellam.plan import Strand
from lightning_dhellam.search.pipeline.schedules.work import (
    Part,
    Schedule,
    ScheduleError,
    Work,
    done_as,
)

Edge = tuple[int, int, Strand]
"""Sending stage, receiving stage, and the strand whose tensors go there: first in, first out."""


def check(schedule: Schedule) -> None:
    """Refuse a schedule that is not whole, that deadlocks, or whose messages cross on an edge.

    Stages carry out their visits in order. A visit starts when all it needs has been received, and
    sends when it ends. What one strand sends from a stage to another must be received in the same
    order there, as communicators know no tags; the two strands have a communicator each.

    Raises:
        ScheduleError: names the stage and the visit, or the chunk and the micro-batch.
    """
    _whole(schedule)
    _alive(schedule)
    _matched(schedule)


def _whole(schedule: Schedule) -> None:
    """Check that every chunk meets every micro-batch once each way, on the stage that holds it."""
    seen: dict[tuple[int, int], Counter[Part]] = defaultdict(Counter)
    for stage, row in enumerate(schedule.visits):
        for works in row:
            strands = Counter(work.part is Part.FORWARD for work in works)
            if not works or max(strands.values()) > 1:
                raise ScheduleError(
                    f"stage {stage} of {schedule.name}: a visit is one work, or a forward beside a"
                    f" backward, not '{_text(works)}'"
                )
            for work in works:
                if schedule.stage_of[work.chunk] != stage:
                    raise ScheduleError(
                        f"stage {stage} of {schedule.name} does {work}, but stage"
                        f" {schedule.stage_of[work.chunk]} holds chunk {work.chunk}"
                    )
                seen[work.chunk, work.micro_batch][work.part] += 1
    whole = ({Part.FORWARD: 1, Part.BACKWARD: 1}, {Part.FORWARD: 1, Part.INPUT: 1, Part.WEIGHT: 1})
    for chunk in range(schedule.chunks):
        for k in range(schedule.micro_batches):
            found = dict(seen.pop((chunk, k), {}))
            if found not in whole:
                parts = ", ".join(f"{part} {n} times" for part, n in found.items()) or "nothing"
                raise ScheduleError(
                    f"{schedule.name} does {parts} of chunk {chunk} for micro-batch {k}:"
                    " once forward and once backward is right"
                )
    if seen:
        chunk, k = next(iter(seen))
        raise ScheduleError(
            f"{schedule.name} does chunk {chunk} for micro-batch {k}, of"
            f" {schedule.micro_batches} micro-batches"
        )


def _alive(schedule: Schedule) -> None:
    """Let the stages go as far as they come. Whoever is left waits for ever."""
    done: set[Work] = set()
    at = [0] * schedule.stages
    moved = True
    while moved:
        moved = False
        for stage, row in enumerate(schedule.visits):
            while at[stage] < len(row) and all(
                before in done for work in row[at[stage]] for before in schedule.before(work)
            ):
                done.update(done_as(work) for work in row[at[stage]])
                at[stage] += 1
                moved = True
    for stage, row in enumerate(schedule.visits):
        if at[stage] < len(row):
            works = row[at[stage]]
            missing = [b for work in works for b in schedule.before(work) if b not in done]
            raise ScheduleError(
                f"{schedule.name} deadlocks: stage {stage} waits at visit {at[stage]},"
                f" '{_text(works)}', for {_text(tuple(missing))}, which nobody can reach"
            )


def _matched(schedule: Schedule) -> None:
    """Check that on every edge messages are received in the order in which they are sent."""
    sent, received = messages(schedule)
    for edge in sorted(sent.keys() | received.keys()):
        source, target, strand = edge
        out, into = sent[edge], received[edge]
        if out != into:
            at = next((i for i, (a, b) in enumerate(zip(out, into, strict=False)) if a != b), 0)
            raise ScheduleError(
                f"{schedule.name}: {strand} message {at} from stage {source} to stage {target} is"
                f" {out[at]}, but {into[at]} is received: sends and receives must be in one order"
            )


def messages(schedule: Schedule) -> tuple[dict[Edge, list[Work]], dict[Edge, list[Work]]]:
    """Return the results that each edge carries, in order of sending and in order of receiving."""
    sent: dict[Edge, list[Work]] = defaultdict(list)
    received: dict[Edge, list[Work]] = defaultdict(list)
    for stage, row in enumerate(schedule.visits):
        for work in (work for works in row for work in works):
            for before in schedule.before(work):
                source = schedule.stage_of[before.chunk]
                if source != stage:
                    received[source, stage, before.strand].append(before)
            target = schedule.sent_to(work)
            if target is not None:
                sent[stage, target, work.strand].append(done_as(work))
    return sent, received


def _text(works: tuple[Work, ...]) -> str:
    return "+".join(map(str, works))
