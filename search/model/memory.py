"""How many bytes slots take at once, by issue order: the rule, compiled.

On a device memory goes back to the lane that made it, and only once that lane has waited for every
other lane that read it (`engine.lanes`). Until then it is of no use to anyone, so it counts:

    compute   GEMM reads x                       GEMM writes y
    tp        gather writes x     . . held . . . . . . . . .    scatter waits for y: x is free
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lightning_dhellam.search.model.arrays import Array, Rows, compiled

BARRIER = -1
"""In an order: every lane waits for every other."""


class Slots(NamedTuple):
    """Who makes, reads and keeps the slots of operators that are carried out once or repeatedly.

    Attributes:
        lane: number of the lane of each operator.
        reads: slots that each operator reads.
        writes: slots that each operator writes.
        bytes: size of each slot.
        owner: lane that makes each slot.
        writer: operator that writes each slot, or -1 where it comes from outside.
        before: the slot that each one was in the round before, or -1.
        kept: for each slot, whether it stays when it has been read.
        lanes: how many lanes there are.
        waits: whether memory goes back only when its lane has waited for its readers.
    """

    lane: Array
    reads: Rows
    writes: Rows
    bytes: Array
    owner: Array
    writer: Array
    before: Array
    kept: Array
    lanes: int
    waits: bool


class _Books(NamedTuple):
    """What is noted while rounds are played. Row 0 is the round before the first.

    Attributes:
        left: by round and slot, reads to come.
        number: by round and slot, that of the operator which writes it on its lane, or -1.
        knew: by round and slot, what that lane had seen of each other one.
        used: by round and slot, the last operator of each lane that read it.
        seen: by lane, the last operator of each other one that it has waited for.
        issued: by lane, how many operators.
        waiting: round and slot of what is to be given back.
    """

    left: Array
    number: Array
    knew: Array
    used: Array
    seen: Array
    issued: Array
    waiting: Array


@compiled
def most(slots, order, lagging, rounds):  # type: ignore[no-untyped-def]
    """Return the most bytes that are taken at once in the last of some rounds of an order.

    Args:
        slots: what the operators read and write.
        order: operators of a round, or `BARRIER`.
        lagging: for each operator, whether it is carried out for the round before.
        rounds: how many rounds are played.
    """
    books = _opened(slots, order, lagging, rounds)
    live, held, peak, length = _brought(slots, lagging, books), 0.0, 0.0, 0
    for turn in range(rounds):
        live += _entered(slots, books, turn)
        for x in order:
            when = turn + 1
            if x == BARRIER:
                waited = _join(books)
            else:
                when -= lagging[x]
                waited = _wait(slots, books, x, when)
            if waited:
                freed, length = _collected(slots, books, length)
                held -= freed
            if x == BARRIER:
                continue
            live += _written(slots, books, x, when)
            if turn == rounds - 1:
                peak = max(peak, live + held)
            gone, late, length = _read(slots, books, x, when, length)
            live, held = live - gone, held + late
    return peak


@compiled
def _opened(slots, order, lagging, rounds):  # type: ignore[no-untyped-def]
    """The books before the first round."""
    count, lanes = len(slots.bytes), slots.lanes
    left = np.zeros((rounds + 1, count), np.int64)
    for x in order:
        if x != BARRIER:
            for at in range(slots.reads.offsets[x], slots.reads.offsets[x + 1]):
                slot = slots.reads.values[at]
                left[1:, slot] += 1
                left[0, slot] += lagging[x]
    return _Books(
        left,
        np.full((rounds + 1, count), -1),
        np.full((rounds + 1, count, lanes), -1),
        np.full((rounds + 1, count, lanes), -1),
        np.full((lanes, lanes), -1),
        np.zeros(lanes, np.int64),
        np.zeros(((rounds + 1) * count, 2), np.int64),
    )


@compiled
def _brought(slots, lagging, books):  # type: ignore[no-untyped-def]
    """Bytes that what lags in the first round reads of the round before."""
    total = 0.0
    for slot in range(len(slots.bytes)):
        writer = slots.writer[slot]
        late = writer >= 0 and lagging[writer]
        if books.left[0, slot] and not late and not slots.kept[slot]:
            total += slots.bytes[slot]
    return total


@compiled
def _entered(slots, books, turn):  # type: ignore[no-untyped-def]
    """Bytes that come from outside with a round, less those that the last one has kept.

    Those are another pair's by now.
    """
    total = 0.0
    for slot in range(len(slots.bytes)):
        if slots.writer[slot] < 0:
            total += slots.bytes[slot]
            old = slots.before[slot]
            if old >= 0:
                books.number[turn + 1, slot] = books.number[turn, old]
                books.knew[turn + 1, slot] = books.knew[turn, old]
        if turn and slots.kept[slot]:
            total -= slots.bytes[slot]
    return total


@compiled
def _join(books):  # type: ignore[no-untyped-def]
    """Every lane waits for every other."""
    for lane in range(len(books.issued)):
        for other in range(len(books.issued)):
            if other != lane:
                books.seen[lane, other] = books.issued[other]
    return True


@compiled
def _wait(slots, books, x, when):  # type: ignore[no-untyped-def]
    """The lane of an operator waits for what it reads. Whether it had to."""
    own, waited = slots.lane[x], False
    for at in range(slots.reads.offsets[x], slots.reads.offsets[x + 1]):
        slot = slots.reads.values[at]
        other, number = slots.owner[slot], books.number[when, slot]
        if other != own and books.seen[own, other] < number:
            for lane in range(slots.lanes):
                if lane != own:
                    knew = books.knew[when, slot, lane]
                    books.seen[own, lane] = max(books.seen[own, lane], knew)
            books.seen[own, other] = number
            waited = True
    return waited


@compiled
def _collected(slots, books, length):  # type: ignore[no-untyped-def]
    """Bytes that can be given back now, and how many slots still wait."""
    freed, kept = 0.0, 0
    for at in range(length):
        when, slot = books.waiting[at]
        if _passed(slots, books, when, slot):
            freed += slots.bytes[slot]
        else:
            books.waiting[kept] = books.waiting[at]
            kept += 1
    return freed, kept


@compiled
def _written(slots, books, x, when):  # type: ignore[no-untyped-def]
    """An operator is issued. Bytes that it writes."""
    own, total = slots.lane[x], 0.0
    books.issued[own] += 1
    for at in range(slots.reads.offsets[x], slots.reads.offsets[x + 1]):
        books.used[when, slots.reads.values[at], own] = books.issued[own]
    for at in range(slots.writes.offsets[x], slots.writes.offsets[x + 1]):
        slot = slots.writes.values[at]
        books.number[when, slot] = books.issued[own]
        books.knew[when, slot] = books.seen[own]
        total += slots.bytes[slot]
    return total


@compiled
def _read(slots, books, x, when, length):  # type: ignore[no-untyped-def]
    """Bytes that nobody reads after an operator, those of them that wait, and how many slots do."""
    gone, late = 0.0, 0.0
    for at in range(slots.reads.offsets[x], slots.reads.offsets[x + 1]):
        slot = slots.reads.values[at]
        books.left[when, slot] -= 1
        if books.left[when, slot] or slots.kept[slot]:
            continue
        gone += slots.bytes[slot]
        if slots.waits and not _passed(slots, books, when, slot):
            late += slots.bytes[slot]
            books.waiting[length, 0], books.waiting[length, 1] = when, slot
            length += 1
    for at in range(slots.writes.offsets[x], slots.writes.offsets[x + 1]):
        slot = slots.writes.values[at]
        if not books.left[when, slot] and not slots.kept[slot]:
            gone += slots.bytes[slot]
    return gone, late, length


@compiled
def _passed(slots, books, when, slot):  # type: ignore[no-untyped-def]
    """Whether the lane that made a slot has waited for all that read it."""
    own, passed = slots.owner[slot], True
    for lane in range(slots.lanes):
        passed = passed and (lane == own or books.seen[own, lane] >= books.used[when, slot, lane])
    return passed
