"""The rule of the machine model, compiled. The only copy of it; `cost` says what it means.

A search plays tens of thousands of orders, so everything here is arrays: launches by number, and
what varies in length by launch as one row of values with offsets.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lightning_dhellam.search.model.arrays import Array, Rows, compiled

SETTLED = 1e-9
"""Share by which times between rounds may differ and still be the same."""


class Machine(NamedTuple):
    """The launches of a walk, and what plays them.

    Attributes:
        lane: number of the lane of each launch; compute is 0.
        seconds: seconds of each launch while nothing else runs.
        kinds: row or column of each launch in `slowdowns`.
        waits: how many launches each one waits for.
        followers: the launches that wait for each one.
        slowdowns: of two launches that run together, by their kinds: of the first, a
            communication, and of the second, compute or a communication of another lane.
        behind: slowdowns where communication starts while the compute launch is running.
        launch: seconds the host needs to issue one operator.
        inline: whether compute runs on the host: see `play`.
        looks: whether the host waits for each launch before it issues what follows.
    """

    lane: Array
    seconds: Array
    kinds: Array
    waits: Array
    followers: Rows
    slowdowns: Array
    behind: Array
    launch: float
    inline: bool
    looks: Array

    def mixed(self, other: Machine, chosen: Array) -> Machine:
        """Return a machine where the launches that are `chosen` run as in `other`."""
        seconds = np.where(chosen, other.seconds, self.seconds)
        return self._replace(seconds=seconds, kinds=np.where(chosen, other.kinds, self.kinds))


@compiled
def play(  # type: ignore[no-untyped-def]
    queues,
    seconds,
    kinds,
    waits,
    followers,
    issued,
    host,
    slowdowns,
    behind,
    holds,
    holding,
    looking,
    looks,
    pace,
):
    """Return start and end of each launch, in seconds.

    Time goes from event to event, exact with changing overlaps. A launch that waits for itself
    through its lane or its slots never starts: its times are infinite. Of two that may start at one
    moment, that which waited for its own lane only is a few microseconds earlier.

    Args:
        queues: the launches of each lane, in issue order.
        seconds, kinds, waits, followers, slowdowns, behind: as in `Machine`.
        issued: when the host issues each launch; empty if it always is early enough.
        host: the launches in issue order if compute runs on the host, which then waits for what
            each launch reads, and for the end of compute, before it goes on; else empty.
        holds: the launches that wait for each one to start, counted among `waits`.
        holding: whether only those wait; else what could start with a compute launch goes first.
        looking: the launches in issue order if the host waits for some of them; else empty. What is
            issued after one waits until it has ended, and `issued` is filled in meanwhile.
        looks: whether the host waits for each launch. It starts when the host begins to.
        pace: seconds the host needs to issue one launch.
    """
    lanes = len(queues.offsets) - 1
    count = len(seconds)
    waits = waits.copy()
    starts, ends = np.full(count, np.inf), np.full(count, np.inf)
    # When and by which lane each launch was released last.
    released, releasing = np.full(count, -np.inf), np.zeros(count, np.int64)
    position = queues.offsets[:-1].copy()
    running = np.full(lanes, -1)
    left, slow = np.zeros(lanes), np.ones(lanes)
    computes = np.zeros(count, np.bool_)
    for at in range(queues.offsets[0], queues.offsets[1]):
        computes[queues.values[at]] = True
    issuing, passed = 0, np.full(count, len(host) == 0)
    given, clock, looked = 0, 0.0, -1
    now = 0.0
    while True:
        while given < len(looking):
            if looked >= 0:
                if ends[looked] == np.inf:
                    break
                clock, looked = max(clock, ends[looked]), -1
            launch = looking[given]
            clock += pace
            issued[launch] = clock
            if looks[launch]:
                looked = launch
            given += 1
        while issuing < len(host) and not waits[host[issuing]]:
            launch = host[issuing]
            passed[launch] = True
            if computes[launch] and ends[launch] == np.inf:
                break
            issuing += 1
        until, again = np.inf, False
        for lane in range(lanes):
            if running[lane] >= 0 or position[lane] == queues.offsets[lane + 1]:
                continue
            launch = queues.values[position[lane]]
            if waits[launch] or not passed[launch]:
                continue
            if len(issued) and issued[launch] > now:
                until = min(until, issued[launch])
                continue
            running[lane] = launch
            left[lane] = seconds[launch]
            starts[launch] = now
            position[lane] += 1
            for at in range(holds.offsets[launch], holds.offsets[launch + 1]):
                held = holds.values[at]
                waits[held] -= 1
                released[held], releasing[held] = now, lane
                again = True
        if again:
            continue
        step = until - now
        computing = running[0]
        compute_slow = 1.0
        for lane in range(1, lanes):
            launch = running[lane]
            if launch < 0:
                continue
            slow[lane] = 1.0
            if computing >= 0:
                begun = starts[launch]
                is_later = begun > starts[computing]
                if holding and begun == starts[computing]:
                    # A lane learns a few microseconds later of what another has done.
                    at_ease = released[computing] < begun or releasing[computing] == 0
                    is_later = at_ease and released[launch] == begun and releasing[launch] == 0
                table = behind if is_later else slowdowns
                slow[lane] = table[kinds[launch], kinds[computing], 0]
                compute_slow *= table[kinds[launch], kinds[computing], 1]
            for other in range(1, lanes):
                if other != lane and running[other] >= 0:
                    slow[lane] *= slowdowns[kinds[launch], kinds[running[other]], 0]
            step = min(step, left[lane] * slow[lane])
        if computing >= 0:
            slow[0] = compute_slow
            step = min(step, left[0] * compute_slow)
        if step == np.inf:
            return starts, ends
        now += step
        # What ends within rounding of this moment ends now.
        moment = step + 1e-12 * now
        for lane in range(lanes):
            launch = running[lane]
            if launch < 0:
                continue
            if left[lane] * slow[lane] > moment:
                left[lane] -= step / slow[lane]
                continue
            ends[launch] = now
            running[lane] = -1
            if len(looking) and looks[launch]:
                starts[launch] = issued[launch]
            for at in range(followers.offsets[launch], followers.offsets[launch + 1]):
                follower = followers.values[at]
                waits[follower] -= 1
                released[follower], releasing[follower] = now, lane


@compiled
def perform(machine, lanes, order, first, holding):  # type: ignore[no-untyped-def]
    """Play launches in issue order, and return start and end of each in seconds.

    Args:
        machine: a `Machine`.
        lanes: how many there are.
        order: launches. Those left out never start.
        first: for each launch, whether it begins before the compute launch issued next. Where
            compute runs on the host, nothing can.
        holding: see `play`.
    """
    count = len(machine.lane)
    offsets = np.zeros(lanes + 1, np.int64)
    for launch in order:
        offsets[machine.lane[launch] + 1] += 1
    offsets = np.cumsum(offsets)
    values, filled = np.zeros(len(order), np.int64), offsets[:-1].copy()
    waits = machine.waits.copy()
    holder, held_by = np.zeros(count + 1, np.int64), np.full(count, -1)
    for launch in order:
        lane = machine.lane[launch]
        values[filled[lane]] = launch
        filled[lane] += 1
    # Each launch that goes first holds the next compute launch alone.
    following = -1
    for at in range(len(order) - 1, -1, -1):
        launch = order[at]
        if not machine.lane[launch]:
            following = launch
        elif first[launch] and following >= 0 and not machine.inline:
            held_by[launch] = following
            waits[following] += 1
    for launch in range(count):
        holder[launch + 1] = holder[launch] + (held_by[launch] >= 0)
    held = held_by[held_by >= 0]
    issued = np.zeros(0)
    looking = not machine.inline and machine.looks.any()
    if looking:
        issued = np.full(count, np.inf)
    elif machine.launch and not machine.inline:
        issued = np.zeros(count)
        for number in range(len(order)):
            issued[order[number]] = (number + 1) * machine.launch
    return play(
        Rows(values, offsets),
        machine.seconds,
        machine.kinds,
        waits,
        machine.followers,
        issued,
        order if machine.inline else order[:0],
        machine.slowdowns,
        machine.behind,
        Rows(held, holder),
        holding and not machine.inline,
        order if looking else order[:0],
        machine.looks,
        machine.launch,
    )


@compiled
def repeat(order, lagging, rounds):  # type: ignore[no-untyped-def]
    """Return the launches of `rounds` times an order. What lags is carried out a round later."""
    size = len(order)
    launches, at = np.zeros(rounds * size, np.int64), 0
    for number in range(rounds):
        for x in order:
            launch = number * size + x - (size if lagging[x] else 0)
            # The first round has nothing left over from one before.
            if launch >= 0:
                launches[at] = launch
                at += 1
    for x in order:
        if lagging[x]:
            launches[at] = (rounds - 1) * size + x
            at += 1
    return launches


@compiled
def period(machine, lanes, order, lagging, first):  # type: ignore[no-untyped-def]
    """Return how an order goes that repeats itself: the mean seconds between rounds, whether they
    are the same between all of them, and when each operator starts in a round.

    Args:
        machine: of several rounds of the same launches.
        lanes: how many there are.
        order: operators of a round.
        lagging: for each operator, whether it is carried out for the round before.
        first: for each operator, whether it begins before the compute operator issued next.
    """
    size = len(order)
    rounds = len(machine.lane) // size
    marks = np.zeros(len(machine.lane), np.bool_)
    for launch in range(len(machine.lane)):
        marks[launch] = first[launch % size]
    # A literal would compile `perform` once more.
    holding = not machine.inline
    starts, ends = perform(machine, lanes, repeat(order, lagging, rounds), marks, holding)
    # The last round is there to disturb the one before, as any round would.
    last = (rounds - 2) * size
    low, high = np.inf, 0.0
    begun = np.zeros(size)
    for x in range(size):
        if ends[last + x] == np.inf:
            return np.inf, True, begun
        shift = ends[last + x] - ends[last - size + x]
        low, high = min(low, shift), max(high, shift)
        begun[x] = starts[last + x - (size if lagging[x] else 0)]
    if high - low <= SETTLED * high:
        return high, True, begun
    half = rounds // 2
    mean = 0.0
    for x in range(size):
        mean = max(mean, (ends[last + x] - ends[last - half * size + x]) / half)
    return mean, False, begun
