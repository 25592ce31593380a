"""The schedule that is searched for what visits and transfers cost, and for the memory there is."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lightning_dhellam.pipeline.schedules import (
    Part,
    Placement,
    Schedule,
    ScheduleError,
    Visit,
    Work,
    dual_pipe_v,
    fold,
    verify,
    zero_bubble_v,
)
from lightning_dhellam.search.pipeline import Link, UniformCosts, VisitCost, VisitTable, play, rank
from lightning_dhellam.search.pipeline.searched import Effort, searched

SHORT = Effort(starts=60, improved=2, moves=300)
LINK = Link(1.0, 0.01, 0.1)


def named(stages: int, micro_batches: int) -> Iterator[Schedule]:
    yield fold(stages, micro_batches)
    yield zero_bubble_v(stages, micro_batches)
    if micro_batches >= 2 * stages:
        yield dual_pipe_v(stages, micro_batches)


class Uneven:
    """Chunks that are longer the later they are, and gain a fifth beside each other."""

    def of(self, works: Visit) -> VisitCost:
        alone = UniformCosts(1.0, 1.3, 0.6)
        costs = [alone.of((work,)) for work in works]
        seconds = sum(
            c.seconds * (1 + work.chunk / 4) for c, work in zip(costs, works, strict=True)
        )
        seconds *= 0.8 if len(works) == 2 else 1.0
        both = alone.of(works)
        ready = {work.strand: seconds for work in works}
        return VisitCost(seconds, seconds, ready, both.rise, both.change)

    def bytes_sent(self, work: Work) -> float:
        return 0.05


@pytest.mark.parametrize(("stages", "micro_batches"), [(2, 8), (3, 2), (4, 7), (1, 3)])
@pytest.mark.parametrize("costs", [UniformCosts(1.0, 1.2, 0.8, both=2.7, message=0.05), Uneven()])
def test_it_can_run_and_no_known_one_is_faster(
    stages: int, micro_batches: int, costs: UniformCosts | Uneven
) -> None:
    """Also with chunks of different lengths, and with fewer micro-batches than stages."""
    known = list(named(stages, micro_batches))
    found = searched(
        Placement.folded(stages), micro_batches, costs, LINK, known=known, effort=SHORT
    )
    verify(found)
    seconds = [play(way, costs, LINK).seconds for way in known]
    seconds += [play(way.joined(), costs, LINK).seconds for way in known]
    assert play(found, costs, LINK).seconds <= min(seconds) * (1 + 1e-12)
    assert found.name == "searched"
    assert Schedule.parse(str(found)) == found


def test_it_is_faster_where_known_ones_are_not_made_for_the_costs() -> None:
    """Halves of unequal length, and two strands that gain: those of zb-v never meet, dualpipe-v
    waits for whole backwards while it fills."""
    costs = UniformCosts(1.0, 1.5, 0.5, both=2.5, message=0.02)
    known = list(named(4, 12))
    found = searched(Placement.folded(4), 12, costs, LINK, known=known, effort=SHORT)
    best = min(play(way, costs, LINK).seconds for way in known)
    assert play(found, costs, LINK).seconds < 0.99 * best


def test_the_same_arguments_give_the_same_schedule_without_known_ones_too() -> None:
    costs = UniformCosts(1.0, 1.2, 0.8, both=2.7, message=0.05)
    placement = Placement.folded(3)
    tables = [VisitTable.of_kinds(costs, placement, stage) for stage in range(3)]
    once = searched(placement, 6, costs, LINK, effort=SHORT, seed=3)
    again = searched(placement, 6, VisitTable.joined(tables), LINK, effort=SHORT, seed=3)
    assert once == again
    verify(once)


def test_it_keeps_limits_of_memory_which_cost_time() -> None:
    """In chunks of a micro-batch. zb-v of 4 stages saves 8, dualpipe-v and the fold 9."""
    costs = UniformCosts(1.0, 1.0, 1.0, both=2.7)
    placement, known = Placement.folded(4), list(named(4, 12))
    seconds = []
    for limit in (6.0, 9.0, 24.0):
        found = searched(placement, 12, costs, limits=[limit] * 4, known=known, effort=SHORT)
        run = play(found, costs)
        assert max(use.peak for use in run.stages) <= limit
        seconds.append(run.seconds)
    assert seconds[0] > seconds[1] >= seconds[2]
    with pytest.raises(ScheduleError, match="no schedule was found that keeps the limit of memory"):
        searched(placement, 12, costs, limits=[1.0] * 4, known=known, effort=SHORT)


def test_gradients_of_the_longer_reduction_are_there_earlier() -> None:
    """Of two chunks on one stage it makes that one's last gradients first."""
    costs = UniformCosts(1.0, 1.0, 1.0)
    placement = Placement.folded(2)
    for slow in (0, 3):
        reductions = [0.0] * 4
        reductions[slow] = 6.0
        found = searched(placement, 4, costs, effort=SHORT, reductions=reductions)
        plain = searched(placement, 4, costs, effort=SHORT)
        there = play(found, costs, reductions=reductions).seconds
        assert there <= play(plain, costs, reductions=reductions).seconds


def test_a_schedule_is_ranked_within_the_memory_and_told_why() -> None:
    costs = UniformCosts(1.0, 1.0, 1.0, message=0.01)
    ways = [fold(4, 12), zero_bubble_v(4, 12), dual_pipe_v(4, 12)]
    free = rank(ways, costs, LINK)
    assert [one.run.schedule.name for one in free] == ["zb-v", "dualpipe-v", "fold"]
    assert [one.run.seconds for one in free] == sorted(one.run.seconds for one in free)
    assert free[0].reason == ""
    assert all("slower: " in one.reason for one in free[1:])
    tight = rank(ways, costs, LINK, limits=[8.0, 8.0, 8.0, 7.0])
    assert [one.over for one in tight] == [1.0, 2.0, 2.0]
    none = rank(ways, costs, LINK, limits=[8.0] * 4)
    assert none[0].run.schedule.name == "zb-v"
    assert none[0].over == 0.0 and none[1].over == 1.0
    assert "would save 12.5% more than its limit" in none[1].reason


def test_parts_are_known_to_the_letters() -> None:
    """Whatever a schedule may be made of is read and written back."""
    from lightning_dhellam.search.pipeline.playing import wires_of
    from lightning_dhellam.search.pipeline.searched.letters import Task

    costs, placement = UniformCosts(), Placement.folded(3)
    task = Task.of(placement, 6, costs, wires_of(placement, costs))
    for schedule in named(3, 6):
        letters = task.read(schedule)
        assert letters is not None and task.is_whole(letters)
        assert task.schedule(letters, schedule.name) == schedule
    assert {work.part for work in zero_bubble_v(3, 6).works} == {*Part} - {Part.BACKWARD}
