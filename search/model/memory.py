"""How many bytes slots take at once, by issue order: the rule, compiled.

On a device memory goes back to the lane that made it, and only once that lane has waited for every
other lane that read it (`engine.lanes`). Until then it is of no use to anyone, so it counts:

    compute   GEMM reads x                       GEMM writes y
    tp        gather writes x     . . held . . . . . . . . .    scatter waits for y: x is free

Compute waits for copies to and from the host when it has been given as many operators since as they
say (`Operator.ahead`), and their lanes for what it had been given when they were issued.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lightning_dhellam.search.model.arrays import Array, Rows, compiled, inlined

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
        takes: the slot whose memory each one takes over when it is written, or -1.
        given: for each slot, whether another takes over its memory.
        home: lane to which the memory of each slot goes back.
        kept: for each slot, whether it stays when it has been read.
        lanes: how many lanes there are.
        waits: whether memory goes back only when its lane has waited for its readers.
        copies: for each lane, whether it carries copies to or from the host.
        ahead: of copies, operators that compute may be given before it waits for them.
    """

    lane: Array
    reads: Rows
    writes: Rows
    bytes: Array
    owner: Array
    writer: Array
    before: Array
    takes: Array
    given: Array
    home: Array
    kept: Array
    lanes: int
    waits: bool
    copies: Array
    ahead: Array


def taking(takes: Sequence[int], owner: Sequence[int]) -> tuple[Array, Array, Array]:
    """Return `takes`, `given` and `home` of slots: what takes memory over comes behind it."""
    home, given = list(owner), [False] * len(owner)
    for slot, taken in enumerate(takes):
        if taken >= 0:
            home[slot], given[taken] = home[taken], True
    return np.array(takes, np.int64), np.array(given, np.bool_), np.array(home, np.int64)


class _Books(NamedTuple):
    """Notes that are kept while rounds are played. Row 0 is the round before the first.

    Attributes:
        left: reads to come, by round and slot.
        number: number on its lane of the operator that writes a slot, or -1, by round and slot.
        knew: what that lane had seen of each other one, by round and slot.
        used: last operator of each lane that read a slot, by round and slot.
        seen: last operator of each other lane that a lane has waited for, by lane.
        issued: how many operators were issued, by lane.
        waiting: round and slot of what is to be given back.
        computed: how many operators compute had been given by each copy, by lane and copy.
        due: how many it has been given when they wait for each other.
        known: what compute had seen of each lane by then, and what the copy's lane had.
        kept_up: copies that compute has waited for, by lane.
    """

    left: Array
    number: Array
    knew: Array
    used: Array
    seen: Array
    issued: Array
    waiting: Array
    computed: Array
    due: Array
    known: Array
    kept_up: Array


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
                if slots.copies[slots.lane[x]]:
                    _note_copy(books, slots.lane[x], slots.ahead[x])
                elif slots.lane[x] == 0:
                    for lane in range(slots.lanes):
                        if slots.copies[lane]:
                            waited = _keep_up(books, lane) or waited
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


@inlined
def _opened(slots, order, lagging, rounds):  # type: ignore[no-untyped-def]
    """Open the books before the first round."""
    count, lanes = len(slots.bytes), slots.lanes
    left = np.zeros((rounds + 1, count), np.int64)
    for x in order:
        if x != BARRIER:
            for at in range(slots.reads.offsets[x], slots.reads.offsets[x + 1]):
                slot = slots.reads.values[at]
                for when in range(1, rounds + 1):
                    left[when, slot] += 1
                left[0, slot] += lagging[x]
    return _Books(
        left,
        np.full((rounds + 1, count), -1),
        np.full((rounds + 1, count, lanes), -1),
        np.full((rounds + 1, count, lanes), -1),
        np.full((lanes, lanes), -1),
        np.zeros(lanes, np.int64),
        np.zeros(((rounds + 1) * count, 2), np.int64),
        np.zeros((lanes, rounds * len(order) + 1), np.int64),
        np.zeros((lanes, rounds * len(order) + 1), np.int64),
        np.zeros((2, lanes, rounds * len(order) + 1, lanes), np.int64),
        np.zeros(lanes, np.int64),
    )


@inlined
def _brought(slots, lagging, books):  # type: ignore[no-untyped-def]
    """Return the bytes that what lags in the first round reads of the round before."""
    total = 0.0
    for slot in range(len(slots.bytes)):
        writer = slots.writer[slot]
        late = writer >= 0 and lagging[writer]
        if books.left[0, slot] and not late and not slots.kept[slot]:
            total += slots.bytes[slot]
    return total


@inlined
def _entered(slots, books, turn):  # type: ignore[no-untyped-def]
    """Return the bytes that come from outside with a round, less what the last one has kept.

    What was kept is another pair's by now.
    """
    total = 0.0
    for slot in range(len(slots.bytes)):
        if slots.writer[slot] < 0:
            total += slots.bytes[slot]
            old = slots.before[slot]
            if old >= 0:
                books.number[turn + 1, slot] = books.number[turn, old]
                for lane in range(slots.lanes):
                    books.knew[turn + 1, slot, lane] = books.knew[turn, old, lane]
        if turn and slots.kept[slot]:
            total -= slots.bytes[slot]
    return total


@inlined
def _join(books):  # type: ignore[no-untyped-def]
    """Let every lane wait for every other."""
    for lane in range(len(books.issued)):
        for other in range(len(books.issued)):
            if other != lane:
                books.seen[lane, other] = books.issued[other]
    return True


@inlined
def _wait(slots, books, x, when):  # type: ignore[no-untyped-def]
    """Let the lane of an operator wait for what it reads, and tell whether it had to."""
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


@inlined
def _collected(slots, books, length):  # type: ignore[no-untyped-def]
    """Return the bytes that can be given back now, and how many slots still wait."""
    freed, kept = 0.0, 0
    for at in range(length):
        when, slot = books.waiting[at, 0], books.waiting[at, 1]
        if _passed(slots, books, when, slot):
            freed += slots.bytes[slot]
        else:
            books.waiting[kept, 0], books.waiting[kept, 1] = when, slot
            kept += 1
    return freed, kept


@inlined
def _written(slots, books, x, when):  # type: ignore[no-untyped-def]
    """Note that an operator is issued, and return the bytes that it writes."""
    own, total = slots.lane[x], 0.0
    books.issued[own] += 1
    for at in range(slots.reads.offsets[x], slots.reads.offsets[x + 1]):
        books.used[when, slots.reads.values[at], own] = books.issued[own]
    for at in range(slots.writes.offsets[x], slots.writes.offsets[x + 1]):
        slot = slots.writes.values[at]
        books.number[when, slot] = books.issued[own]
        for lane in range(slots.lanes):
            books.knew[when, slot, lane] = books.seen[own, lane]
        total += slots.bytes[slot]
        taken = slots.takes[slot]
        if taken >= 0:
            total -= slots.bytes[taken]
            for lane in range(slots.lanes):
                books.used[when, slot, lane] = books.used[when, taken, lane]
    return total


@inlined
def _read(slots, books, x, when, length):  # type: ignore[no-untyped-def]
    """Return bytes that nobody reads after an operator, those that wait, and how many slots do."""
    gone, late = 0.0, 0.0
    for at in range(slots.reads.offsets[x], slots.reads.offsets[x + 1]):
        slot = slots.reads.values[at]
        books.left[when, slot] -= 1
        if books.left[when, slot] or slots.kept[slot] or slots.given[slot]:
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


@inlined
def _note_copy(books, lane, ahead):  # type: ignore[no-untyped-def]
    """Note what compute and the lane of a copy have seen by the time that it is issued."""
    copy = books.issued[lane] + 1
    books.computed[lane, copy] = books.issued[0]
    books.due[lane, copy] = books.issued[0] + ahead
    for other in range(len(books.issued)):
        books.known[0, lane, copy, other] = books.seen[0, other]
        books.known[1, lane, copy, other] = books.seen[lane, other]


@inlined
def _keep_up(books, lane):  # type: ignore[no-untyped-def]
    """Let compute, before its next operator, wait for a lane's copies that are due, and that lane
    for it, and tell whether they had to."""
    waited = False
    while (
        books.kept_up[lane] < books.issued[lane]
        and books.due[lane, books.kept_up[lane] + 1] <= books.issued[0]
    ):
        books.kept_up[lane] += 1
        old = books.kept_up[lane]
        for side in range(2):
            own, other = (lane, 0) if side == 0 else (0, lane)
            number = books.computed[lane, old] if side == 0 else old
            if books.seen[own, other] < number:
                for third in range(len(books.issued)):
                    if third != own:
                        knew = books.known[side, lane, old, third]
                        books.seen[own, third] = max(books.seen[own, third], knew)
                books.seen[own, other] = number
                waited = True
    return waited


@inlined
def _passed(slots, books, when, slot):  # type: ignore[no-untyped-def]
    """Tell whether the lane that a slot's memory goes back to has waited for all that read it."""
    own, passed = slots.home[slot], True
    for lane in range(slots.lanes):
        passed = passed and (lane == own or books.seen[own, lane] >= books.used[when, slot, lane])
    return passed
