"""The rule by which a pipeline plays, compiled: the only copy of it. `playing` draws it.

A search plays tens of thousands of schedules, so everything here is arrays: the visits of all
stages by number, one stage's behind the other's, and results by strand, chunk and micro-batch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lightning_dhellam.search.model.arrays import Array, compiled

FORWARD, BACKWARD = 0, 1
"""Strands, as numbers."""
WHOLE, INPUT, WEIGHT = 0, 1, 2
"""Parts of a backward, as numbers."""


class Visits(NamedTuple):
    """The visits of all stages.

    Attributes:
        offsets: number of each stage's first visit, and how many there are.
        works: of each visit the chunk and the micro-batch that go forward, and those that go
            backward, -1 where none does, and the part of the backward.
        seconds: seconds of each visit while no transfer takes anything from it.
        ready: seconds from the start of each visit until the results of its forward and of its
            backward are there.
    """

    offsets: Array
    works: Array
    seconds: Array
    ready: Array


class Wires(NamedTuple):
    """How results get to other stages.

    Attributes:
        place: stage of each chunk.
        carry: seconds for which the result of each chunk, forward and backward, is on a link.
        late: seconds more until it is there.
        takes: share of compute that a transfer takes from both of its stages while bytes come.
        waits: share that a receive takes from its posting on, while none come.
        posted: walks between the posting of a receive and the walk that needs it.
        lead: walks after which a stage waits for the end of what it has sent; 0 if it never does.
    """

    place: Array
    carry: Array
    late: Array
    takes: float
    waits: float
    posted: int
    lead: int


@compiled
def slowed(moment, start, end, before, during):  # type: ignore[no-untyped-def]
    """Return when that ends which was to end at `moment`, with a share `before` of compute taken
    from start on, if from start to end it is `during`."""
    if moment <= start or end <= start or before == during:
        return moment
    work, done = (moment - start) * (1.0 - before), (end - start) * (1.0 - during)
    if work <= done:
        return start + work / (1.0 - during)
    return end + (work - done) / (1.0 - before)


@compiled
def walks_of(visits):  # type: ignore[no-untyped-def]
    """Return the first visit of the walk that each visit is part of; see `pipeline.schedules`."""
    works, offsets = visits.works, visits.offsets
    first = np.arange(len(works))
    for stage in range(len(offsets) - 1):
        for visit in range(offsets[stage] + 1, offsets[stage + 1]):
            one, other = works[visit - 1], works[visit]
            goes_on = (one[0] < 0) == (other[0] < 0) and (one[2] < 0) == (other[2] < 0)
            if goes_on and one[0] >= 0:
                goes_on = other[0] == one[0] + 1 and other[1] == one[1]
            if goes_on and one[2] >= 0:
                goes_on = other[2] == one[2] - 1 and other[3] == one[3]
                goes_on = goes_on and other[4] == one[4] and one[4] != WEIGHT
            if goes_on:
                first[visit] = first[visit - 1]
    return first


@compiled
def _before(first, visit, number, lowest):  # type: ignore[no-untyped-def]
    """Return the first visit of the walk `number` walks before that of a visit; -1 if none is."""
    at = first[visit]
    for _ in range(number):
        if at <= lowest:
            return -1
        at = first[at - 1]
    return at


@compiled
def results(visits, wires, micro_batches):  # type: ignore[no-untyped-def]
    """Return what each visit needs and makes, by number of a result.

    Returns:
        needs: of each visit what its forward and its backward go on from, and what of its own chunk
            must be done; -1 if nothing.
        makes: the results of each visit, -1 if it has no such strand.
        sent: whether each result goes to another stage.
    """
    works, chunks = visits.works, len(wires.place)
    needs = np.full((len(works), 3), -1)
    makes = np.full((len(works), 2), -1)
    sent = np.zeros(2 * chunks * micro_batches, np.bool_)
    half = chunks * micro_batches
    for visit in range(len(works)):
        chunk, k = works[visit, 0], works[visit, 1]
        if chunk >= 0:
            makes[visit, FORWARD] = chunk * micro_batches + k
            if chunk > 0:
                needs[visit, FORWARD] = (chunk - 1) * micro_batches + k
                sent[(chunk - 1) * micro_batches + k] = wires.place[chunk - 1] != wires.place[chunk]
        chunk, k = works[visit, 2], works[visit, 3]
        if chunk < 0:
            continue
        if works[visit, 4] == WEIGHT:
            needs[visit, 2] = half + chunk * micro_batches + k
            continue
        makes[visit, BACKWARD] = half + chunk * micro_batches + k
        needs[visit, 2] = chunk * micro_batches + k
        if chunk + 1 < chunks:
            other = half + (chunk + 1) * micro_batches + k
            needs[visit, BACKWARD] = other
            sent[other] = wires.place[chunk + 1] != wires.place[chunk]
    return needs, makes, sent


@compiled
def run(visits, wires, micro_batches):  # type: ignore[no-untyped-def]
    """Play a step. Returns start and end of each visit, and the seconds that its stage waited for
    transfers before it. Times are infinite where stages wait for each other for ever.

    Time goes from event to event: the begin of a walk, which posts receives and may then wait for
    what it needs; the start of a visit, or of a transfer.
    """
    offsets, place, takes = visits.offsets, wires.place, wires.takes
    waits = wires.waits
    spins = waits > 0.0
    seconds, ready = visits.seconds, visits.ready
    stages, count = len(offsets) - 1, len(seconds)
    needs, makes, sent = results(visits, wires, micro_batches)
    first = walks_of(visits)
    total = len(sent)
    # Of results: when they are made and here, who makes them and where they go.
    made, here = np.full(total, np.inf), np.full(total, np.inf)
    maker, goal = np.full(total, -1), np.full(total, -1)
    post = np.full(total, -1)  # the visit that posts the receive; -1 is before all
    posts = np.full((count, 2), -1)  # what each visit posts
    until = np.full(count, -1)  # before which visit all must be gone that was sent
    spinning = np.zeros(stages, np.int64)  # receives that take their share, until nobody knows
    for stage in range(stages):
        for visit in range(offsets[stage], offsets[stage + 1]):
            for result in makes[visit]:
                if result >= 0:
                    maker[result] = visit
            if first[visit] == visit and wires.lead:
                until[visit] = _before(first, visit, wires.lead - 1, offsets[stage])
            for strand in range(2):
                result = needs[visit, strand]
                if result < 0 or not sent[result]:
                    continue
                goal[result] = stage
                post[result] = _before(first, visit, wires.posted, offsets[stage])
                if post[result] >= 0:
                    posts[post[result], strand] = result
                elif spins:
                    spinning[stage] += 1
    unsent, gone = np.zeros(count, np.int64), np.zeros(count)
    waiting, many = np.empty(total, np.int64), 0  # transfers that could begin
    egress, ingress = np.zeros(stages), np.zeros(stages)
    at, settled = offsets[:-1].copy(), offsets[:-1].copy()
    free, held, slow = np.zeros(stages), np.zeros(stages), np.zeros(stages)
    starts, ends, waited = np.full(count, np.inf), np.full(count, np.inf), np.zeros(count)
    begun = np.where(first == np.arange(count), np.inf, 0.0)
    soon, changed = np.zeros(stages), np.ones(stages, np.bool_)
    while True:
        best, chosen, message = np.inf, -1, -1
        for stage in range(stages):
            if changed[stage]:
                changed[stage] = False
                soon[stage] = np.inf
                visit = at[stage]
                if visit == offsets[stage + 1]:
                    continue
                start = free[stage]
                while settled[stage] < until[visit] and not unsent[settled[stage]]:
                    held[stage] = max(held[stage], gone[settled[stage]])
                    settled[stage] += 1
                if settled[stage] < until[visit]:
                    continue
                if until[visit] >= 0:
                    start = max(start, held[stage])
                for strand in range(3):
                    result = needs[visit, strand]
                    if result >= 0 and begun[visit] < np.inf:
                        is_sent = strand < 2 and sent[result]
                        start = max(start, here[result] if is_sent else made[result])
                soon[stage] = start
            if soon[stage] < best:
                best, chosen = soon[stage], stage
        for number in range(many):
            result = waiting[number]
            source = -1
            moment = max(made[result], ingress[goal[result]])
            if moment < best:
                visit = maker[result]
                source = place[(result % (total // 2)) // micro_batches]
                moment = max(moment, egress[source])
                if post[result] >= 0:
                    moment = max(moment, begun[post[result]])
                if moment < best:
                    best, chosen, message = moment, source, number
        if best == np.inf:
            break
        if message >= 0:
            result = waiting[message]
            many -= 1
            waiting[message] = waiting[many]
            target, visit = goal[result], maker[result]
            chunk, strand = (result % (total // 2)) // micro_batches, 2 * result // total
            end = best + wires.carry[chunk, strand]
            egress[chosen] = ingress[target] = end
            here[result] = end + wires.late[chunk, strand]
            unsent[visit] -= 1
            gone[visit] = max(gone[visit], end)
            changed[chosen] = changed[target] = True
            if takes:
                for stage in (chosen, target):
                    over = here[result] if spins and stage == target else end
                    begins = max(best, slow[stage])
                    usual = waits if spinning[stage] else 0.0
                    _slow(stage, begins, over, usual, takes, at, offsets, makes, made, free)
                    slow[stage] = max(slow[stage], over)
            if spins:
                spinning[target] -= 1
                if not spinning[target]:
                    begins = slow[target]
                    _slow(target, begins, np.inf, waits, 0.0, at, offsets, makes, made, free)
            continue
        visit = at[chosen]
        if begun[visit] == np.inf:
            begun[visit] = best
            changed[chosen] = True
            for result in posts[visit]:
                if result < 0:
                    continue
                if made[result] < np.inf:
                    waiting[many] = result
                    many += 1
                if spins:
                    if not spinning[chosen]:
                        begins = max(best, slow[chosen])
                        _slow(chosen, begins, np.inf, 0.0, waits, at, offsets, makes, made, free)
                    spinning[chosen] += 1
            continue
        if visit > offsets[chosen]:
            ends[visit - 1] = free[chosen]
        starts[visit] = best
        waited[visit] = _waited(free[chosen], held[chosen], needs[visit], sent, here, made)
        at[chosen] = visit + 1
        changed[chosen] = True
        usual = waits if spinning[chosen] else 0.0
        end = slowed(best + seconds[visit], best, np.inf, 0.0, usual)
        free[chosen] = slowed(end, best, slow[chosen], usual, takes)
        for strand in range(2):
            result = makes[visit, strand]
            if result < 0:
                continue
            end = slowed(best + ready[visit, strand], best, np.inf, 0.0, usual)
            made[result] = slowed(end, best, slow[chosen], usual, takes)
            if sent[result]:
                unsent[visit] += 1
                if post[result] < 0 or begun[post[result]] < np.inf:
                    waiting[many] = result
                    many += 1
    for stage in range(stages):
        if offsets[stage] < at[stage] == offsets[stage + 1]:
            ends[at[stage] - 1] = free[stage]
    return starts, ends, waited


@compiled
def _slow(stage, start, end, before, during, at, offsets, makes, made, free):  # type: ignore[no-untyped-def]
    """Let a share of what a stage still does of its visit be taken, from start to end."""
    visit = at[stage] - 1
    if visit < offsets[stage]:
        return
    for result in makes[visit]:
        if result >= 0:
            made[result] = slowed(made[result], start, end, before, during)
    free[stage] = slowed(free[stage], start, end, before, during)


@compiled
def _waited(free, held, needs, sent, here, made):  # type: ignore[no-untyped-def]
    """Return for how long a stage waits for what is made but not here, or is sent but not gone."""
    one, other = needs[0], needs[1]
    if one < 0 or not sent[one]:
        one, other = other, one
    if one < 0 or not sent[one]:
        return max(0.0, held - free)
    if other >= 0 and sent[other] and here[other] < here[one]:
        one, other = other, one
    waited = max(0.0, here[one] - max(free, made[one]))
    free = max(free, here[one])
    if other >= 0 and sent[other]:
        waited += max(0.0, here[other] - max(free, made[other]))
        free = max(free, here[other])
    return waited + max(0.0, held - free)


@compiled
def drained(visits, ends, place, reductions):  # type: ignore[no-untyped-def]
    """Return when each stage is done, with the reduction of its chunks' gradients.

    That of a chunk begins when its last gradient of weights is there; a stage has one at a time.
    """
    stages = len(visits.offsets) - 1
    last = np.zeros(len(place))
    over = np.zeros(stages)
    for stage in range(stages):
        for visit in range(visits.offsets[stage], visits.offsets[stage + 1]):
            over[stage] = max(over[stage], ends[visit])
            if visits.works[visit, 2] >= 0 and visits.works[visit, 4] != INPUT:
                chunk = visits.works[visit, 2]
                last[chunk] = max(last[chunk], ends[visit])
    busy = np.zeros(stages)
    for chunk in np.argsort(last):
        stage = place[chunk]
        busy[stage] = max(busy[stage], last[chunk]) + reductions[chunk]
    for stage in range(stages):
        if busy[stage] > over[stage]:
            over[stage] = busy[stage]
    return over
