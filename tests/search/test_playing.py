"""The pipeline simulator against formulas of the literature and timelines worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest

from lightning_dhellam.pipeline.schedules import (
    Part,
    Schedule,
    Visit,
    Work,
    dual_pipe_v,
    fold,
    interleaved_1f1b,
    one_f_one_b,
    peak_activations,
    sends_ahead,
    walks,
    zero_bubble_v,
)
from lightning_dhellam.plan import Strand
from lightning_dhellam.search.measure import Transfer
from lightning_dhellam.search.pipeline import (
    Link,
    PipelineRun,
    UniformCosts,
    VisitCost,
    links_of,
    play,
)

Make = Callable[[int, int], Schedule]
SIZES = [(1, 4), (2, 4), (3, 9), (4, 8), (4, 20), (8, 24)]
EVERY: list[Make] = [one_f_one_b, interleaved_1f1b, zero_bubble_v, dual_pipe_v, fold]


def bubbles(played: PipelineRun) -> list[float]:
    return [use.bubble for use in played.stages]


@pytest.mark.parametrize(("stages", "micro_batches"), [*SIZES, (4, 1), (4, 3)])
def test_1f1b_takes_the_time_of_its_formula(stages: int, micro_batches: int) -> None:
    costs = UniformCosts(1.0, 1.25, 0.75)
    played = play(one_f_one_b(stages, micro_batches), costs)
    assert played.seconds == pytest.approx((micro_batches + stages - 1) * 3.0)
    assert bubbles(played) == pytest.approx([(stages - 1) * 3.0] * stages)


@pytest.mark.parametrize(("stages", "rounds"), [(2, 2), (4, 2), (4, 3), (8, 2)])
def test_interleaving_divides_the_bubble(stages: int, rounds: int) -> None:
    """By the number of chunks that a stage has (arXiv 2104.04473, section 2.2.2)."""
    costs = UniformCosts(1.0 / rounds, 1.25 / rounds, 0.75 / rounds)
    for groups in (1, 2, 3):
        played = play(interleaved_1f1b(stages, groups * stages, rounds), costs)
        assert bubbles(played) == pytest.approx([(stages - 1) * 3.0 / rounds] * stages)


@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_zero_bubble_v_waits_only_while_the_pipeline_fills(stages: int, micro_batches: int) -> None:
    played = play(zero_bubble_v(stages, micro_batches), UniformCosts(1.0, 1.0, 1.0))
    assert bubbles(played) == pytest.approx([stages - 1] * stages)


@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_dual_pipe_v_has_the_published_bubble(stages: int, micro_batches: int) -> None:
    """(P - 1)(F&B + B - 3W) for P stages of two chunks (table in DeepSeek's DualPipe)."""
    costs = UniformCosts(1.0, 1.0, 1.0)
    played = play(dual_pipe_v(stages, micro_batches), costs)
    assert bubbles(played) == pytest.approx([(stages - 1) * (3 + 2 - 3)] * stages)


@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
@pytest.mark.parametrize("both", [3.0, 2.4])
def test_the_fold_waits_two_passes_for_each_other_stage(
    stages: int, micro_batches: int, both: float
) -> None:
    """As 1F1B, whose visits are twice as long, if two strands gain nothing; less if they do."""
    played = play(fold(stages, micro_batches), UniformCosts(1.0, 1.0, 1.0, both=both))
    assert bubbles(played) == pytest.approx([2 * (stages - 1) * both] * stages)


@pytest.mark.parametrize("micro_batches", [1, 2, 5, 12, 24])
def test_the_fold_saves_as_much_as_the_trainer_predicts(micro_batches: int) -> None:
    for stages in (1, 2, 4, 8):
        played = play(fold(stages, micro_batches), UniformCosts())
        predicted = map(peak_activations, fold(stages, micro_batches).visits)
        assert [use.peak for use in played.stages] == list(predicted)


def test_peaks_of_activations() -> None:
    """In chunks, of which those of 1F1B are twice as large as the others."""
    peaks = [[use.peak for use in play(make(4, 16), UniformCosts()).stages] for make in EVERY]
    straight, interleaved, zero_bubble, dual, folded = peaks
    assert straight == [4, 3, 2, 1]
    assert interleaved == [11, 9, 7, 5]
    assert zero_bubble == [8, 8, 8, 8]
    assert dual == folded == [9, 9, 9, 9]


def test_fewer_micro_batches_than_stages_save_less() -> None:
    assert [use.peak for use in play(one_f_one_b(4, 2), UniformCosts()).stages] == [2, 2, 2, 1]


LINKS = [Link(), Link(latency=0.3), Link(bandwidth=2.0, latency=0.1)]


@pytest.mark.parametrize(("make", "link"), list(product(EVERY, LINKS)))
def test_what_a_stage_does_adds_up_and_follows_its_list(make: Make, link: Link) -> None:
    schedule = make(3, 9)
    played = play(schedule, UniformCosts(1.0, 1.1, 0.7, both=2.5, message=0.5), link)
    for use, visits in zip(played.stages, schedule.visits, strict=True):
        total = use.compute + use.exposed + use.transfer + use.bubble
        assert total == pytest.approx(played.seconds)
        assert min(use.transfer, use.bubble) >= -1e-9
        assert tuple(one.works for one in use.intervals) == visits
        ends = [0.0, *(visit.end for visit in use.intervals)]
        assert all(visit.start >= end for visit, end in zip(use.intervals, ends, strict=False))
    assert played.seconds == max(use.intervals[-1].end for use in played.stages)


@pytest.mark.parametrize("make", EVERY)
def test_nothing_starts_before_it_has_arrived(make: Make) -> None:
    """A message takes 0.25 s of bandwidth and 0.1 s of latency."""
    schedule = make(3, 9)
    played = play(schedule, UniformCosts(message=0.5), Link(bandwidth=2.0, latency=0.1))
    intervals = {
        (work.chunk, work.strand, work.micro_batch): visit
        for use in played.stages
        for visit in use.intervals
        for work in visit.works
        if work.part is not Part.WEIGHT
    }
    assert len(intervals) == 2 * schedule.chunks * 9
    followed = 0
    for (chunk, strand, k), visit in intervals.items():
        other = chunk + (1 if strand is Strand.FORWARD else -1)
        if 0 <= other < schedule.chunks:
            local = schedule.placement.stage_of[chunk] == schedule.placement.stage_of[other]
            assert intervals[other, strand, k].start >= visit.end + (0.0 if local else 0.35) - 1e-9
            followed += 1
    assert followed == 2 * (schedule.chunks - 1) * 9


def test_slower_links_never_help() -> None:
    for make in EVERY:
        seconds = [
            play(make(4, 8), UniformCosts(message=1.0), Link(bandwidth)).seconds
            for bandwidth in (100.0, 10.0, 1.0)
        ]
        assert seconds == sorted(seconds)
        assert seconds[0] < seconds[-1]


def test_a_step_with_transfers_by_hand() -> None:
    """Two stages, one micro-batch; a message takes 2 s of bandwidth and 0.5 s of latency."""
    costs = UniformCosts(1.0, 1.0, 1.0, message=4.0)
    played = play(one_f_one_b(2, 1), costs, Link(bandwidth=2.0, latency=0.5))
    # Forward 0-1, on its way to 3.5, forward to 4.5, backward to 6.5, to 9, backward to 11.
    assert played.seconds == pytest.approx(11.0)
    first, second = played.stages
    assert [s.start for s in first.intervals] == pytest.approx([0, 9])
    assert [s.start for s in second.intervals] == pytest.approx([3.5, 4.5])
    assert (first.transfer, second.transfer) == pytest.approx((2.5, 2.5))
    assert (first.bubble, second.bubble) == pytest.approx((5.5, 5.5))


def test_a_stage_sends_one_message_at_a_time() -> None:
    """Two forwards end at 1 and 2; each message takes 3 s, so the second arrives at 7."""
    played = play(one_f_one_b(3, 2), UniformCosts(message=3.0), Link(bandwidth=1.0))
    starts = [s.start for s in played.stages[1].intervals if s.works[0].part is Part.FORWARD]
    assert starts == pytest.approx([4, 7])


def test_each_stage_has_a_link_of_its_own_to_each_neighbour() -> None:
    """Forward 0-1, 1 s, 2-3, no way, forward and backward 3-6; 4 s, 10-12; 2 s, 14-16."""
    links = {(0, 1): Link(4.0), (2, 1): Link(1.0), (1, 0): Link(4.0, 1.0)}
    played = play(one_f_one_b(3, 1), UniformCosts(message=4.0), links)
    assert starts(played) == [
        pytest.approx([0, 14]),
        pytest.approx([2, 10]),
        pytest.approx([3, 4]),
    ]
    assert played.seconds == pytest.approx(16.0)


def test_a_link_follows_from_two_sizes_and_none_from_nothing() -> None:
    def row(size: float, beside: float, takes: float = 0.0) -> Transfer:
        return Transfer(0, 1, size, beside / 2, beside, takes)

    assert links_of([]) == {}
    assert links_of([row(100.0, 2.0, 0.3), row(20.0, 1.2, 0.1)]) == {(0, 1): Link(100.0, 1.0, 0.3)}
    of_large = links_of([row(100.0, 2.0, 0.1), row(20.0, 1.2, 0.8)])[0, 1]
    assert of_large.takes == 0.1, "what a short one takes is small beside what a host disturbs"
    by_engine = [replace(row(100.0, 2.0, 0.3), spins=False), row(20.0, 1.2)]
    assert links_of(by_engine) == {(0, 1): Link(100.0, 1.0, 0.3, waits=0.0)}
    spinning = [replace(row(100.0, 2.0, 0.3), waits=0.1), row(20.0, 1.2)]
    assert links_of(spinning) == {(0, 1): Link(100.0, 1.0, 0.3, waits=0.1)}
    assert links_of([row(100.0, 2.0)]) == {(0, 1): Link(50.0)}
    assert links_of([row(100.0, 2.0), row(20.0, 3.0)]) == {(0, 1): Link(50.0)}, "noise"
    assert links_of([row(100.0, 2.0), row(50.0, 0.5)]) == {(0, 1): Link(50.0)}, (
        "no negative latency"
    )
    assert links_of([row(100.0, 2.0, 1.7)])[0, 1].takes < 1.0


def test_a_sender_waits_for_what_it_has_sent_some_walks_before() -> None:
    """In the fold of two stages that is two walks; a message takes 6 s here, and a forward 1."""
    schedule = fold(2, 4)
    ahead = sends_ahead(schedule)
    costs = UniformCosts(message=6.0)
    walks_of = walks(schedule.visits[0])
    played = play(schedule, costs, Link(1.0))
    begins = {visit.works: visit.start for visit in played.stages[0].intervals}
    ends = {visit.works: visit.end for visit in played.stages[0].intervals}
    for number, walk in enumerate(walks_of[ahead:], ahead):
        for works in walks_of[number - ahead]:
            if any(schedule.sent_to(work) is not None for work in works):
                assert begins[walk[0]] >= ends[works] + 6.0 - 1e-9


class EarlyForward:
    """Passes of 4 s whose forward strand can be sent after 1 s."""

    def of(self, works: Visit) -> VisitCost:
        ready = {work.strand: 1.0 if work.strand is Strand.FORWARD else 4.0 for work in works}
        return VisitCost(4.0, 3.0, ready, 0.0, 0.0)

    def bytes_sent(self, work: Work) -> float:
        return 0.0


def test_a_strand_is_sent_before_its_pass_ends() -> None:
    played = play(one_f_one_b(2, 1), EarlyForward())
    assert [visit.start for visit in played.stages[1].intervals] == [1, 5]
    assert [(use.compute, use.exposed) for use in played.stages] == [(6, 2), (6, 2)]


def starts(played: PipelineRun) -> list[list[float]]:
    return [[visit.start for visit in use.intervals] for use in played.stages]


def test_a_transfer_begins_when_its_receive_is_posted_a_walk_ahead() -> None:
    """Messages take 3 s. The second forward is made at 2 and could go at 4, when the first has
    gone, but stage 1 posts it with its first backward, at 5."""
    played = play(one_f_one_b(2, 3), UniformCosts(message=3.0), Link(bandwidth=1.0))
    assert starts(played)[1][:3] == pytest.approx([4, 5, 8])


def test_a_receive_that_spins_takes_compute_from_when_it_is_posted() -> None:
    """Half of it. Stage 0 posts the backward with its only forward, which so takes 2 s: sent from 2
    to 4 and there at 4.5, forward to 5.5, backward to 7.5, there at 10, backward to 12."""
    link = Link(bandwidth=2.0, latency=0.5, takes=0.5, waits=0.5)
    played = play(one_f_one_b(2, 1), UniformCosts(message=4.0), link)
    assert played.seconds == pytest.approx(12.0)
    assert starts(played) == [pytest.approx([0, 10]), pytest.approx([4.5, 5.5])]
    assert played.stages[0].transfer == pytest.approx(1.0 + 2.5)  # longer, and waiting
    assert played.stages[0].compute == 3.0


def test_transfers_slow_what_runs_beside_them_and_no_more() -> None:
    """Messages take 1 s and half of compute. What happens, stage by stage:

    0: 0F0 0-1; 0F1 beside the receive of 1B0, 1-3; 0B0 6.5-10.25, beside the receive of 1B1 to 10;
       0B1 to 12.25.
    1: 1F0 2-3; 1B0 3-5.5, beside the receive of 0F1 to 4; 1F1 5.5-7, beside the sending of 1B0
       to 6.5; 1B1 7-9.
    """
    costs = UniformCosts(message=1.0)
    played = play(one_f_one_b(2, 2), costs, Link(bandwidth=1.0, takes=0.5, waits=0.5))
    assert starts(played) == [pytest.approx([0, 1, 6.5, 10.25]), pytest.approx([2, 3, 5.5, 7])]
    assert played.seconds == pytest.approx(12.25)
    beside = play(one_f_one_b(2, 2), costs, Link(bandwidth=1.0))
    assert starts(beside) == [pytest.approx([0, 1, 6, 9]), pytest.approx([2, 3, 5, 6])]
    assert beside.seconds == pytest.approx(11.0)


def test_a_receive_that_does_not_spin_takes_compute_while_bytes_come() -> None:
    """Stage 0: 0F0 0-1, 0F1 1-2.5, beside the sending of 0F0 from 1 to 2. Stage 1: 1F0 2-3, 1B0
    3-5.5, beside the receive of 0F1 from 2.5 to 3.5; 1F1 5.5-7, beside the sending of 1B0 to 6.5;
    1B1 7-9. Stage 0 again: 0B0 6.5-8.5, 0B1 10-12."""
    costs = UniformCosts(message=1.0)
    played = play(one_f_one_b(2, 2), costs, Link(1.0, takes=0.5, waits=0.0))
    assert starts(played) == [pytest.approx([0, 1, 6.5, 10]), pytest.approx([2, 3, 5.5, 7])]
    assert played.seconds == pytest.approx(12.0)


def test_a_receive_that_waits_takes_less_than_one_that_comes() -> None:
    """A quarter of compute, against half. A message takes 1 s, and half a second of latency.

    0: 0F0 0-1; 0F1 from 1 on beside the sending of 0F0, until 2, and then beside the receive of 1B0
       that waits, to 2.667; 0B0 from 7.75 on beside that of 1B1, which waits until 9.75, to 10.75;
       0B1 11.25-13.25.
    1: 1F0 2.5-3.5; 1B0 from 3.5 on beside the receive of 0F1, which comes until 5, to 6.25; 1F1
       beside the sending of 1B0, to 7.75; 1B1 to 9.75.
    """
    link = Link(1.0, 0.5, takes=0.5, waits=0.25)
    played = play(one_f_one_b(2, 2), UniformCosts(message=1.0), link)
    assert starts(played) == [
        pytest.approx([0, 1, 7.75, 11.25]),
        pytest.approx([2.5, 3.5, 6.25, 7.75]),
    ]
    assert played.stages[0].intervals[1].end == pytest.approx(2 + 0.5 / 0.75)
    assert played.stages[0].intervals[2].end == pytest.approx(10.75)
    assert played.seconds == pytest.approx(13.25)


def test_what_a_waiting_receive_takes_is_no_more_than_a_coming_one() -> None:
    assert Link(takes=0.33).waiting == pytest.approx(16 / 132)
    assert Link(takes=0.05).waiting == 0.05 and Link(waits=0.3).waiting == 0.0
    assert Link(takes=0.3, waits=0.1).waiting == 0.1 and Link(takes=0.3, waits=0.0).waiting == 0.0
    costs = UniformCosts(1.0, 1.1, 0.7, both=2.5, message=0.3)
    for make in EVERY:
        steps = [
            play(make(3, 9), costs, Link(2.0, 0.1, 0.3, waits)).seconds
            for waits in (0.0, 0.1, 0.2, 0.3, 0.9)
        ]
        assert steps == sorted(steps) and steps[-2] == steps[-1]


@pytest.mark.parametrize("waits", [None, 0.9, 0.05, 0.0])
@pytest.mark.parametrize("make", EVERY)
def test_what_transfers_take_of_compute_never_helps(make: Make, waits: float | None) -> None:
    costs = UniformCosts(1.0, 1.1, 0.7, both=2.5, message=0.3)
    steps = [play(make(3, 9), costs, Link(2.0, 0.1, takes, waits)) for takes in (0.0, 0.1, 0.3)]
    assert [step.seconds for step in steps] == sorted(step.seconds for step in steps)
    assert [sum(step.share("transfer")) for step in steps] == sorted(
        sum(step.share("transfer")) for step in steps
    )
    for use in steps[-1].stages:
        total = use.compute + use.exposed + use.transfer + use.bubble
        assert total == pytest.approx(steps[-1].seconds)


def test_a_step_ends_with_the_reduction_of_the_last_gradients() -> None:
    """Stage 1 is done with the backward at 4, stage 0 at 6."""
    schedule = one_f_one_b(2, 1)
    assert play(schedule, UniformCosts(), reductions=[1.5, 5.0]).seconds == pytest.approx(9.0)
    assert play(schedule, UniformCosts(), reductions=[1.5, 1.0]).seconds == pytest.approx(7.5)
    # One stage reduces its second chunk from 4 to 8, and the first one after it.
    assert play(fold(1, 1), UniformCosts(), reductions=[1.0, 4.0]).seconds == pytest.approx(9.0)
    # Gradients of weights decide, not those of inputs.
    split = play(zero_bubble_v(2, 4), UniformCosts(), reductions=[1.0] * 4)
    assert split.seconds >= play(zero_bubble_v(2, 4), UniformCosts()).seconds + 1.0
