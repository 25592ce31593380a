"""Schedules on folded layers: of P stages, stage s holds chunks s and 2P-1-s of 2P.

Chunk s is called the descending one, as micro-batches go down the stages in it, and chunk 2P-1-s
the ascending one. Both ends of the model are on stage 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

from lightning_dhellam.pipeline.schedules.schedule import Schedule
from lightning_dhellam.pipeline.schedules.straight import check_numbers
from lightning_dhellam.pipeline.schedules.work import Part, Visit, Work, one
from lightning_dhellam.plan.placement import Placement

_F, _B, _I, _W = Part


def fold(stages: int, micro_batches: int) -> Schedule:
    """Make our schedule: descending and ascending visits of two strands, in the order of 1F1B.

    A micro-batch goes forward down the stages, turns on the last one and comes up again, and so
    does its gradient: a W. So what goes forward and what comes backward visit the stages in the
    same order, and a stage takes the forward of one micro-batch together with the backward of
    another that is P behind it. Two stages, four micro-batches; digits go forward, letters backward
    (a is the backward of 0):

        stage 0   0↓      1↓  0↑  2↓a 1↑  3↓b 2↑a  c↓ 3↑b  d↓  c↑      d↑
        stage 1       0↓  0↑  1↓  1↑  2↓a 2↑a 3↓b 3↑b  c↓  c↑  d↓  d↑

    The idea is DHeLlam's model folding (DHelix, arXiv 2411.15871). It is defined for every number
    of stages and micro-batches.
    """
    check_numbers(stages, micro_batches)
    rows = tuple(tuple(_folded_row(s, stages, micro_batches)) for s in range(stages))
    return Schedule("fold", micro_batches, Placement.folded(stages), rows)


def _folded_row(stage: int, stages: int, micro_batches: int) -> Iterator[Visit]:
    """Give the visits of a stage with `r` stages after it.

    Visit D(k) descends with the forward of micro-batch k and the backward of k-P, visit A(k)
    ascends with the same two; k runs from 0 to M+P-1. A partner that does not exist is left out,
    and so is a visit of neither. The order is 1F1B over D and A: r visits D ahead, then one D and
    one A in turn, then the visits A that are left. Backward reaches stage 0 P visits D behind
    forward because forward of a micro-batch takes 2P-1 visits to come up again, and each stage runs
    two in the time of a micro-batch.
    """
    descending = (stage, 2 * stages - 1 - stage)
    after = stages - 1 - stage
    for index in range(micro_batches + stages + after):
        for (ahead, behind), k in ((descending, index), (descending[::-1], index - after)):
            works = []
            if 0 <= k < micro_batches:
                works.append(Work(ahead, _F, k))
            if 0 <= k - stages < micro_batches:
                works.append(Work(behind, _B, k - stages))
            if works:
                yield tuple(works)


def zero_bubble_v(stages: int, micro_batches: int) -> Schedule:
    """Make ZB-V: single strands, and gradients of weights fill what would be a bubble.

    With forward, input gradient and weight gradients of equal length, no transfers and at least
    2P - 1 micro-batches, the only bubble is that of filling and draining the pipeline. Source:
    arXiv 2401.10241, section 6, in closed form. Fewer micro-batches leave out the visits of
    those that are missing. It is defined for every number of stages and micro-batches.
    """
    check_numbers(stages, micro_batches)
    made = max(micro_batches, 2 * stages - 1)
    rows = tuple(tuple(_zero_bubble_row(s, stages, made)) for s in range(stages))
    return Schedule("zb-v", made, Placement.folded(stages), rows).of_first(micro_batches)


def _zero_bubble_row(stage: int, stages: int, micro_batches: int) -> Iterator[Visit]:
    """Give the visits of a stage with `r` stages after it, as powers of works on chunks 0 and 1.

    F0^(2r+1)  (F1 F0)^s  (F1 I1 W1)^(r+1)  (F0 I0 W0 F1 I1 W1)^…  (I0 I1)^s  (I0 W0)^(r+1)  W…
    """
    chunks = (stage, 2 * stages - 1 - stage)
    after = stages - 1 - stage
    next_of = {(part, half): count() for part in Part for half in (0, 1)}
    done = dict.fromkeys(next_of, 0)

    def do(*works: tuple[Part, int]) -> Iterator[Visit]:
        for part, half in works:
            if done[part, half] < micro_batches:
                done[part, half] += 1
                yield one(chunks[half], part, next(next_of[part, half]))

    for _ in range(2 * after + 1):
        yield from do((_F, 0))
    for _ in range(stage):
        yield from do((_F, 1), (_F, 0))
    for _ in range(after + 1):
        yield from do((_F, 1), (_I, 1), (_W, 1))
    while done[_F, 1] < micro_batches:
        yield from do((_F, 0), (_I, 0), (_W, 0), (_F, 1), (_I, 1), (_W, 1))
    for _ in range(stage):
        yield from do((_I, 0), (_I, 1))
    for _ in range(after + 1):
        yield from do((_I, 0), (_W, 0))
    for half in (1, 0):
        while done[_W, half] < micro_batches:
            yield from do((_W, half))


def dual_pipe_v(stages: int, micro_batches: int) -> Schedule:
    """Make DualPipeV: DualPipe cut in half, forwards beside backwards in the middle of the step.

    Where a backward stands alone at the ends, some leave their weight gradients for later.
    Sources: DeepSeek-V3 (arXiv 2412.19437, section 3.2.1) and the phases of DeepSeek's DualPipe.
    It is made for at least 2P micro-batches; fewer leave out the works of those that are missing.
    """
    check_numbers(stages, micro_batches)
    made = max(micro_batches, 2 * stages)
    rows = tuple(tuple(_dual_row(s, stages, made)) for s in range(stages))
    whole = Schedule("dualpipe-v", made, Placement.folded(stages), rows)
    return whole.of_first(micro_batches)


def _dual_row(stage: int, stages: int, micro_batches: int) -> Iterator[Visit]:
    """Give the visits of a stage with `r` stages after it; `X|Y` is a visit of two strands.

    F0^2r  (F0 F1)^(s+1)  (I1 W F1)^r  (F0|B1 F1|B0)^…  (B1 F1|B0)^r  (B1 B0)^(s+1)  (W I0)^r  W…
    """
    chunks = (stage, 2 * stages - 1 - stage)
    after = stages - 1 - stage
    next_of: dict[tuple[bool, int], Callable[[], int]] = {
        (ahead, half): count().__next__ for ahead in (True, False) for half in (0, 1)
    }
    postponed: list[Work] = []

    def forward(half: int) -> Work:
        return Work(chunks[half], _F, next_of[True, half]())

    def backward(half: int, split: bool = False) -> Work:
        work = Work(chunks[half], _I if split else _B, next_of[False, half]())
        if split:
            postponed.append(Work(work.chunk, _W, work.micro_batch))
        return work

    for _ in range(2 * after):
        yield (forward(0),)
    for _ in range(stage + 1):
        yield (forward(0),)
        yield (forward(1),)
    for _ in range(after):
        yield (backward(1, split=True),)
        yield (postponed.pop(0),)
        yield (forward(1),)
    for number in range(micro_batches - 2 * stages + stage + 1):
        if not number and not after:
            # On the last stage the first two do not wait for each other.
            yield (forward(0),)
            yield (backward(1),)
        else:
            yield forward(0), backward(1)
        yield forward(1), backward(0)
    for _ in range(after):
        yield (backward(1),)
        yield forward(1), backward(0)
    for number in range(stage + 1):
        half_way = (stage + 1) // 2
        yield (backward(1, split=number > half_way or (number == half_way and stage % 2 == 1)),)
        yield (backward(0, split=number >= half_way),)
    for _ in range(after):
        yield (postponed.pop(0),)
        yield (backward(0, split=True),)
    for work in postponed:
        yield (work,)
