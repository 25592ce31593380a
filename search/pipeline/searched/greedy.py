"""Schedules made visit by visit, by what is possible first and by a few rules. Compiled."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lightning_dhellam.search.model.arrays import compiled
from lightning_dhellam.search.pipeline.rule import INPUT, WEIGHT, WHOLE
from lightning_dhellam.search.pipeline.searched.letters import PARTS, Letters

DEEP, SHALLOW, TURNS = range(3)
"""Which chunk of a stage goes first where several could: the later one of the model, the earlier
one, or that which has done less."""


class Rules(NamedTuple):
    """What a schedule is made by. Shares are of the seconds of the work that is meant.

    Attributes:
        patience: seconds that a work waits for a partner, as a share of a forward.
        early: backwards that a stage halves at first, for each stage behind it.
        late: backwards that a stage halves in the end, for each stage of the pipeline.
        forward, backward: which chunk goes first.
        gap: share of a gradient of weights that must fit into a gap for it to fill that.
        owed: gradients of weights that may wait before they go ahead of a forward.
        pairs: whether a forward goes beside a backward; 2 if beside the first half too.
        ahead: most micro-batches in flight in any chunk of a stage but its last.
    """

    patience: float
    early: float
    late: float
    forward: int
    backward: int
    gap: float
    owed: int
    pairs: int
    ahead: int


@compiled
def _takes(way, one, other, done):  # type: ignore[no-untyped-def]
    """Whether chunk `one` of a stage goes before chunk `other`."""
    if other < 0:
        return True
    if way == DEEP:
        return one > other
    if way == SHALLOW:
        return one < other
    return done[one] < done[other] or (done[one] == done[other] and one > other)


@compiled
def constructed(task, rules):  # type: ignore[no-untyped-def]
    """Return the letters of a schedule. Rows are shorter than they must be if it gets stuck."""
    held, place, kinds = task.held, task.wires.place, task.kinds
    stages, many = held.shape
    chunks, micro_batches = len(place), task.micro_batches
    rows = np.full((stages, PARTS * many * micro_batches + 2, 2), -1)
    length = np.zeros(stages, np.int64)
    forward = np.full((chunks + 1, micro_batches), np.inf)
    backward = np.full((chunks + 1, micro_batches), np.inf)
    own = np.full((chunks, micro_batches), np.inf)
    forward[0] = 0.0
    backward[chunks] = 0.0
    done = np.zeros((3, stages, many), np.int64)  # forwards, backwards, halved
    owed = np.zeros((stages, many), np.int64)
    free, saved = np.zeros(stages), np.zeros(stages)
    dirty = np.ones(stages, np.bool_)
    soon = np.full(stages, np.inf)
    letter = np.full((stages, 2), -1)
    ahead_at, behind_at = np.full(many, np.inf), np.full(many, np.inf)
    while True:
        best = -1
        for stage in range(stages):
            if dirty[stage]:
                dirty[stage] = False
                soon[stage] = np.inf
                cap = task.limits[stage]
                total = done[1, stage].sum()
                halves = total < rules.early * (stages - 1 - stage)
                left = many * micro_batches - total
                halves = halves or left <= rules.late * stages
                whole = INPUT if halves else WHOLE
                first = np.inf
                for c in range(many):
                    ahead_at[c] = behind_at[c] = np.inf
                    chunk, k = held[stage, c], done[0, stage, c]
                    if k < micro_batches:
                        # The last chunk's room is kept free, or nothing would ever come back.
                        room = saved[stage] + kinds.rise[stage, c + 1, 0]
                        if c + 1 < many and done[0, stage, many - 1] < micro_batches:
                            room += kinds.rise[stage, many, 0]
                        flying = k - done[1, stage, c]
                        if room <= cap and (c + 1 == many or flying < rules.ahead):
                            ahead_at[c] = max(free[stage], forward[chunk, k])
                            first = min(first, ahead_at[c])
                    k = done[1, stage, c]
                    if k < done[0, stage, c]:
                        arrives = max(own[chunk, k], backward[chunk + 1, k])
                        behind_at[c] = max(free[stage], arrives)
                        first = min(first, behind_at[c])
                f, b, w = -1, -1, -1
                for c in range(many):
                    if owed[stage, c] and (w < 0 or owed[stage, c] > owed[stage, w]):
                        w = c
                fill = np.inf
                if w >= 0:
                    fill = free[stage] + rules.gap * kinds.seconds[stage, 0, PARTS * w + WEIGHT + 1]
                if w >= 0 and first > fill:
                    soon[stage] = free[stage]
                    letter[stage, 0], letter[stage, 1] = -1, PARTS * w + WEIGHT
                    continue
                if first == np.inf:
                    continue
                slack = first + rules.patience * kinds.seconds[stage, 1, 0]
                if rules.pairs and (whole == WHOLE or rules.pairs == 2):
                    for c in range(many):
                        if ahead_at[c] > slack:
                            continue
                        for o in range(many):
                            if behind_at[o] > slack:
                                continue
                            part = INPUT if owed[stage, o] else whole
                            if kinds.seconds[stage, c + 1, PARTS * o + part + 1] == np.inf:
                                continue
                            if f < 0 or _takes(rules.forward, c, f, done[0, stage]):
                                f, b = c, o
                if f >= 0:
                    soon[stage] = max(ahead_at[f], behind_at[b])
                    letter[stage, 0] = f
                    letter[stage, 1] = PARTS * b + (INPUT if owed[stage, b] else whole)
                    continue
                now = first * (1.0 + 1e-9)
                for c in range(many):
                    if behind_at[c] <= now and _takes(rules.backward, c, b, done[1, stage]):
                        b = c
                if b < 0:
                    for c in range(many):
                        if ahead_at[c] <= now and _takes(rules.forward, c, f, done[0, stage]):
                            f = c
                soon[stage] = first
                if b >= 0:
                    letter[stage, 0] = -1
                    letter[stage, 1] = PARTS * b + (INPUT if owed[stage, b] else whole)
                elif w >= 0 and owed[stage].sum() > rules.owed:
                    soon[stage] = free[stage]
                    letter[stage, 0], letter[stage, 1] = -1, PARTS * w + WEIGHT
                else:
                    letter[stage, 0], letter[stage, 1] = f, -1
            if soon[stage] < np.inf and (best < 0 or soon[stage] < soon[best]):
                best = stage
        if best < 0:
            return Letters(rows, length)
        start, f, b = soon[best], letter[best, 0], letter[best, 1]
        rows[best, length[best], 0], rows[best, length[best], 1] = f, b
        length[best] += 1
        free[best] = start + kinds.seconds[best, f + 1, b + 1]
        saved[best] += kinds.change[best, f + 1, b + 1]
        dirty[best] = True
        if f >= 0:
            chunk, k = held[best, f], done[0, best, f]
            done[0, best, f] += 1
            made = start + kinds.ready[best, f + 1, b + 1, 0]
            own[chunk, k] = made
            if chunk + 1 < chunks:
                dirty[place[chunk + 1]] = True
                if place[chunk + 1] != best:
                    made += task.wires.carry[chunk, 0] + task.wires.late[chunk, 0]
            forward[chunk + 1, k] = made
        if b >= 0:
            c, part = b // PARTS, b % PARTS
            if part == WEIGHT:
                owed[best, c] -= 1
                continue
            owed[best, c] += part == INPUT
            chunk, k = held[best, c], done[1, best, c]
            done[1, best, c] += 1
            made = start + kinds.ready[best, f + 1, b + 1, 1]
            if chunk > 0:
                dirty[place[chunk - 1]] = True
                if place[chunk - 1] != best:
                    made += task.wires.carry[chunk, 1] + task.wires.late[chunk, 1]
            backward[chunk, k] = made
