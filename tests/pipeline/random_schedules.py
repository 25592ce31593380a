"""Schedules that can be carried out and that nobody would think of."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

from lightning_dhellam.pipeline.schedules import Part, Placement, Schedule, Visit, Work, done_as


def random_schedule(seed: int, placement: Placement, micro_batches: int) -> Schedule:
    """Draw works in any order in which they can be done, some backwards whole and some in halves.

    A forward and a backward of one stage that are both ready may be one visit.
    """
    draw = random.Random(seed)
    rows: list[list[Visit]] = [[] for _ in range(placement.stages)]
    empty = Schedule("random", micro_batches, placement, ())
    split = {
        (chunk, k): draw.random() < 0.5
        for chunk in range(placement.chunks)
        for k in range(micro_batches)
    }
    done: set[Work] = set()
    # What each edge carries and nobody has received, first in, first out.
    sent: dict[tuple[int, int, str], list[Work]] = defaultdict(list)
    following: Counter[tuple[int, str]] = Counter()

    def ready(stage: int) -> list[Work]:
        found = []
        for chunk in placement.held(stage):
            for way in ("F", "B", "W"):
                k = following[chunk, way]
                if k == micro_batches:
                    continue
                halved = split[chunk, k]
                if way == "W" and not halved:
                    continue
                if way == "B" and not halved and following[chunk, "W"] < k:
                    continue  # gradients of weights are added up in order
                part = Part(way if way != "B" or not halved else "I")
                work = Work(chunk, part, k)
                if all(before in done for before in empty.before(work)) and all(
                    sent[edge][0] == before for edge, before in received(work)
                ):
                    found.append(work)
        return found

    def received(work: Work) -> list[tuple[tuple[int, int, str], Work]]:
        stage_of = placement.stage_of
        here = stage_of[work.chunk]
        return [
            ((stage_of[before.chunk], here, before.strand), before)
            for before in empty.before(work)
            if stage_of[before.chunk] != here
        ]

    while True:
        choices = [(stage, works) for stage in range(placement.stages) if (works := ready(stage))]
        if not choices:
            return Schedule("random", micro_batches, placement, tuple(map(tuple, rows)))
        stage, works = draw.choice(choices)
        work = draw.choice(works)
        visit: Visit = (work,)
        partners = [other for other in works if other.strand is not work.strand]
        if partners and draw.random() < 0.6:
            visit = (work, draw.choice(partners))
        rows[stage].append(visit)
        for one in visit:
            done.add(done_as(one))
            for edge, _ in received(one):
                sent[edge].pop(0)
            target = empty.sent_to(one)
            if target is not None:
                sent[stage, target, one.strand].append(done_as(one))
            following[one.chunk, "B" if one.part is Part.INPUT else str(one.part)] += 1
            if one.part is Part.BACKWARD:
                following[one.chunk, "W"] += 1
