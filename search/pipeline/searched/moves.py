"""Schedules made better move by move, by simulated annealing. Compiled."""

from __future__ import annotations

import numpy as np

from lightning_dhellam.search.model.arrays import compiled
from lightning_dhellam.search.pipeline.rule import INPUT, WEIGHT, WHOLE
from lightning_dhellam.search.pipeline.searched.letters import PARTS, Letters, excess, judged

SHIFT, PAIR, PART, SPLIT, JOIN = range(5)
"""Moves: a letter elsewhere, two letters beside each other, two that are apart, a backward in its
halves, halves as a whole."""
_REACH = 12
"""Places that a letter moves at most."""
_TAIL = 0.02
"""Weight of the mean time after which stages are done, beside that of the last one: where two
schedules take as long, there is more room in the one whose stages are done earlier."""
_OVER = 2.0
"""Price of memory above the limit, as a share of the time for as much again."""


@compiled
def draw(state, below):  # type: ignore[no-untyped-def]
    """Return a number from 0 up to `below`, of a xorshift generator."""
    x = state[0]
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    state[0] = x
    return np.int64((x >> np.uint64(11)) % np.uint64(below))


@compiled
def _moved(row, length, source, target):  # type: ignore[no-untyped-def]
    """Take a letter from one place to another."""
    ahead, behind = row[source, 0], row[source, 1]
    step = 1 if target > source else -1
    for place in range(source, target, step):
        row[place, 0], row[place, 1] = row[place + step, 0], row[place + step, 1]
    row[target, 0], row[target, 1] = ahead, behind


@compiled
def _inserted(row, length, place, ahead, behind):  # type: ignore[no-untyped-def]
    """Put a letter at a place."""
    for other in range(length, place, -1):
        row[other, 0], row[other, 1] = row[other - 1, 0], row[other - 1, 1]
    row[place, 0], row[place, 1] = ahead, behind


@compiled
def _removed(row, length, place):  # type: ignore[no-untyped-def]
    """Take a letter away."""
    for other in range(place, length - 1):
        row[other, 0], row[other, 1] = row[other + 1, 0], row[other + 1, 1]


@compiled
def changed(row, length, seconds, state):  # type: ignore[no-untyped-def]
    """Make a move in a row, and return its new length; -1 if the move drawn cannot be made here.

    Args:
        row: letters of a stage, with room for more.
        length: how many there are.
        seconds: what letters of the stage cost.
        state: of the random numbers.
    """
    move = draw(state, 10)
    move = SHIFT if move < 5 else move - 5
    # Ends of a row matter more than its middle, of which one period is as the other.
    place = draw(state, length)
    if draw(state, 2):
        edge = draw(state, min(length, 48))
        place = edge if draw(state, 2) else length - 1 - edge
    reach = 1 + draw(state, _REACH)
    other = place + reach if draw(state, 2) else place - reach
    ahead, behind = row[place, 0], row[place, 1]
    if move == SHIFT:
        if not 0 <= other < length:
            return -1
        _moved(row, length, place, other)
        return length
    if move == PAIR:
        if not 0 <= other < length or (ahead >= 0) == (row[other, 0] >= 0):
            return -1
        if (behind >= 0) == (row[other, 1] >= 0):
            return -1
        ahead, behind = max(ahead, row[other, 0]), max(behind, row[other, 1])
        if seconds[ahead + 1, behind + 1] == np.inf:
            return -1
        row[place, 0], row[place, 1] = ahead, behind
        _removed(row, length, other)
        return length - 1
    if move == PART:
        if ahead < 0 or behind < 0:
            return -1
        first = draw(state, 2)
        row[place, first] = -1
        _inserted(row, length, place, -1 if first else ahead, behind if first else -1)
        return length + 1
    if behind < 0 or length == len(row) - 1:
        return -1
    chunk, part = behind // PARTS, behind % PARTS
    if move == SPLIT:
        if part != WHOLE or seconds[ahead + 1, behind + INPUT + 1] == np.inf:
            return -1
        row[place, 1] = behind + INPUT
        later = min(length, place + 1 + draw(state, _REACH))
        _inserted(row, length, later, -1, PARTS * chunk + WEIGHT)
        return length + 1
    if part != INPUT or seconds[ahead + 1, PARTS * chunk + 1] == np.inf:
        return -1
    for later in range(place + 1, length):
        if row[later, 0] < 0 and row[later, 1] == PARTS * chunk + WEIGHT:
            row[place, 1] = PARTS * chunk
            _removed(row, length, later)
            return length - 1
    return -1


@compiled
def annealed(letters, task, evaluations, heat, seed):  # type: ignore[no-untyped-def]
    """Return the best letters found with so many evaluations, and the seconds of their step.

    Args:
        letters: to begin with.
        task: what is searched for.
        evaluations: how many schedules may be played.
        heat: first temperature, as a share of the seconds of a step; it falls to a hundredth.
        seed: of the random numbers.
    """
    state = np.array([seed * 2654435761 + 88172645463325252], np.uint64)
    here = Letters(letters.rows.copy(), letters.length.copy())
    last, mean = judged(here, task)
    over = excess(here, task)
    scale = last
    score = last + _TAIL * mean + _OVER * over * scale
    best, found = Letters(here.rows.copy(), here.length.copy()), last
    if over > 0.0:
        found = np.inf
    kept = here.rows[0].copy()
    most, stages = 0, len(here.length)
    while most < evaluations:
        most += 1
        stage = draw(state, stages)
        length = here.length[stage]
        kept[:] = here.rows[stage]
        longer = changed(here.rows[stage], length, task.kinds.seconds[stage], state)
        if longer < 0:
            here.rows[stage][:] = kept
            most -= 0.9
            continue
        here.length[stage] = longer
        over = excess(here, task)
        last, mean = judged(here, task)
        then = last + _TAIL * mean + _OVER * over * scale
        warm = heat * scale * 0.01 ** (most / evaluations)
        chance = (1 + draw(state, 1 << 30)) / (1 << 30)
        if then <= score or (then < np.inf and chance < np.exp((score - then) / warm)):
            score = then
            if over == 0.0 and last < found:
                found = last
                best = Letters(here.rows.copy(), here.length.copy())
        else:
            here.rows[stage][:] = kept
            here.length[stage] = length
    return best, found
