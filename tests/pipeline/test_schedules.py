"""Pipeline schedules: whole lists for small cases, the static check for all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from lightning_dhellam.pipeline.schedules import (
    SCHEDULES,
    Placement,
    Schedule,
    ScheduleError,
    Visit,
    Work,
    check_placed,
    done_as,
    dual_pipe_v,
    fold,
    interleaved_1f1b,
    live_activations,
    one_f_one_b,
    peak_activations,
    placement_of,
    scheme_of,
    sends_ahead,
    verify,
    walks,
    zero_bubble_v,
)
from tests.pipeline.random_schedules import random_schedule

Make = Callable[[int, int], Schedule]
STAGES, MICRO_BATCHES = range(1, 9), range(1, 25)


def table(text: str) -> tuple[tuple[Visit, ...], ...]:
    """Visits from rows like `0F0  0F1+3B0`."""
    rows = [line.split() for line in text.strip().splitlines()]
    return tuple(tuple(tuple(map(Work.parse, p.split("+"))) for p in row) for row in rows)


def test_1f1b_whole() -> None:
    assert one_f_one_b(2, 3).visits == table("""
        0F0 0F1 0B0 0F2 0B1 0B2
        1F0 1B0 1F1 1B1 1F2 1B2
    """)


def test_interleaved_1f1b_whole() -> None:
    """Groups of two micro-batches; stage 0 has two chunks, 0 and 2, and four forwards ahead."""
    assert interleaved_1f1b(2, 4).visits == table("""
        0F0 0F1 2F0 2F1 0F2 2B0 0F3 2B1 2F2 0B0 2F3 0B1 2B2 2B3 0B2 0B3
        1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1F3 1B1 3F2 3B2 3F3 3B3 1B2 1B3
    """)


def test_zero_bubble_v_whole() -> None:
    assert zero_bubble_v(2, 3).visits == table("""
        0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2
        1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2
    """)


def test_dual_pipe_v_whole() -> None:
    assert dual_pipe_v(2, 4).visits == table("""
        0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3+3B1 3F2+0B0 3B2 3F3+0B1 3B3 0I2 0W2 0I3 0W3
        1F0 2F0 1F1 2F1 1F2 2B0 2F2+1B0 1F3+2B1 2F3+1B1 2B2 1B2 2I3 1I3 2W3 1W3
    """)


def test_fold_whole() -> None:
    assert fold(2, 4).visits == table("""
        0F0 0F1 3F0 0F2+3B0 3F1 0F3+3B1 3F2+0B0 3B2 3F3+0B1 3B3 0B2 0B3
        1F0 2F0 1F1 2F1 1F2+2B0 2F2+1B0 1F3+2B1 2F3+1B1 2B2 1B2 2B3 1B3
    """)


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_every_schedule_can_be_carried_out(make: Make) -> None:
    for stages in STAGES:
        for micro_batches in MICRO_BATCHES:
            schedule = make(stages, micro_batches)
            verify(schedule)
            verify(schedule.joined())
            verify(schedule.forward_only())
            assert Schedule.parse(str(schedule)) == schedule
            assert (schedule.stages, schedule.micro_batches) == (stages, micro_batches)


def test_fewer_micro_batches_leave_out_what_is_missing() -> None:
    assert dual_pipe_v(2, 1).visits == table("""
        0F0 3F0 3I0 3W0 0B0
        1F0 2F0 2B0 1B0
    """)
    assert interleaved_1f1b(2, 3).visits == table("""
        0F0 0F1 2F0 2F1 0F2 2B0 2B1 2F2 0B0 0B1 2B2 0B2
        1F0 1F1 3F0 3B0 3F1 3B1 1F2 1B0 1B1 3F2 3B2 1B2
    """)


def test_a_schedule_of_a_file_is_for_as_many_micro_batches_or_fewer(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text(f"{zero_bubble_v(2, 6)}\n")
    scheme = scheme_of(str(path), 2)
    assert scheme(2, 6) == zero_bubble_v(2, 6) and scheme(2, 4) == zero_bubble_v(2, 6).of_first(4)
    verify(scheme(2, 1))
    with pytest.raises(ScheduleError, match=r"mine.txt' is of 6 micro-batches, and a batch has 7"):
        scheme(2, 7)
    with pytest.raises(ScheduleError, match=r"is of 2 stages, but pipeline_parallel_size is 3"):
        scheme_of(str(path), 3)
    path.write_text(str(zero_bubble_v(2, 6)).replace("1F0 ", ""))
    with pytest.raises(ScheduleError, match=r"<-- I 1 times, W 1 times of chunk 1 for micro-batch"):
        scheme_of(str(path), 2)
    path.write_text("hello")
    with pytest.raises(ScheduleError, match=r"schedule='.*mine.txt' is not a schedule: expected"):
        scheme_of(str(path), 2)


@pytest.mark.parametrize("rounds", [1, 3])
def test_interleaving_takes_any_number_of_rounds(rounds: int) -> None:
    for stages in STAGES:
        schedule = interleaved_1f1b(stages, 2 * stages, rounds)
        verify(schedule)
        assert schedule.chunks == rounds * stages


def test_a_name_may_say_how_many_chunks_a_stage_has() -> None:
    assert placement_of("interleaved-1f1b", 2) == Placement.straight(2, 2)
    assert placement_of("interleaved-1f1b-4", 2) == Placement.straight(2, 4)
    assert scheme_of("interleaved-1f1b-4", 2) is scheme_of("interleaved-1f1b-4", 2)


def test_chunks_lie_where_a_model_was_built() -> None:
    check_placed("zb-v", zero_bubble_v, Placement.folded(3))
    check_placed("1f1b", one_f_one_b, Placement.folded(1))
    message = r"'1f1b' has its chunks on stages 0 1, and the model .* on 0 1 1 0: use zb-v or dual"
    with pytest.raises(ScheduleError, match=message):
        check_placed("1f1b", one_f_one_b, Placement.folded(2))


def test_edges_follow_from_where_chunks_lie() -> None:
    def shown(placement: Placement, *, tied: bool = False) -> str:
        return ", ".join(map(str, placement.edges(tied=tied)))

    assert shown(Placement.straight(1, 3)) == ""
    both = "backward 0→1, forward 0→1, backward 1→0, forward 1→0"
    assert shown(Placement.folded(2)) == shown(Placement.straight(2, 2)) == both
    straight = Placement.straight(3)
    assert shown(straight) == "forward 0→1, backward 1→0, forward 1→2, backward 2→1"
    # The last one has the head, and 0 the embedding.
    assert shown(straight, tied=True) == (
        "forward 0→1, forward 0→2, backward 1→0, forward 1→2, backward 2→0, backward 2→1"
    )


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("name", [*SCHEDULES, "interleaved-1f1b-4"])
def test_edges_are_those_that_works_use(name: str, stages: int) -> None:
    scheme = scheme_of(name, stages)
    placement = scheme(stages, 1).placement
    for micro_batches in (1, stages - 1, stages, 3 * stages):
        sent, received = scheme(stages, micro_batches).messages()
        assert sent.keys() == received.keys() == {*placement.edges(tied=False)}
    assert {*placement.edges(tied=True)} == {*sent, *placement.loop}
    assert bool(placement.loop) is (name != "fold" and not name.endswith("-v"))


def test_only_two_strands_share_a_visit() -> None:
    for make in (dual_pipe_v, fold):
        visits = [works for row in make(4, 8).visits for works in row]
        assert {len(works) for works in visits} == {1, 2}
    for make in (one_f_one_b, interleaved_1f1b, zero_bubble_v):
        assert {len(works) for row in make(4, 8).visits for works in row} == {1}


@pytest.mark.parametrize("make", [one_f_one_b, interleaved_1f1b, zero_bubble_v, dual_pipe_v, fold])
def test_numbers_below_one_are_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="stages=0 must be at least 1"):
        make(0, 4)
    with pytest.raises(ValueError, match="micro_batches=0 must be at least 1"):
        make(2, 0)


def test_halves_that_follow_each_other_are_joined() -> None:
    assert zero_bubble_v(2, 3).joined().visits == table("""
        0F0 0F1 0F2 3F0 3B0 3F1 3B1 0B0 3F2 3B2 0B1 0B2
        1F0 2F0 1F1 2F1 2B0 1F2 1B0 2F2 2B1 1I1 2I2 1I2 1W1 2W2 1W2
    """)


def test_fewer_micro_batches_than_stages() -> None:
    assert fold(3, 1).visits == table(
        """
        0F0 5F0 0B0+5B0
        1F0 4F0 4B0 1B0
        2F0 3F0 3B0 2B0
    """.replace("0B0+5B0", "5B0 0B0")
    )


def test_forward_only() -> None:
    assert fold(2, 3).forward_only().visits == table("""
        0F0 0F1 3F0 0F2 3F1 3F2
        1F0 2F0 1F1 2F1 1F2 2F2
    """)


@pytest.mark.parametrize("stages", STAGES)
def test_activations_of_the_fold_are_bounded_balanced_and_all_freed(stages: int) -> None:
    for micro_batches in MICRO_BATCHES:
        schedule = fold(stages, micro_batches)
        peaks = [peak_activations(row) for row in schedule.visits]
        assert max(peaks) <= min(2 * stages + 1, 2 * micro_batches)
        if micro_batches >= 2 * stages:
            assert peaks == [2 * stages + 1] * stages
        assert all(live_activations(row)[-1] == 0 for row in schedule.visits)


@pytest.mark.parametrize(
    ("rows", "row", "message"),
    [
        ("0F0 0F1 0B0 \n 1F0 1B0 1F1 1B1", 0, r"F 1 times of chunk 0 for micro-batch 1"),
        ("0F0 0F1 0B0 0B1 0B1\n 1F0 1B0 1F1 1B1", 0, r"F 1 times, B 2 times of chunk 0"),
        ("0F0 0F1 0B0 0I1\n 1F0 1B0 1F1 1B1", 0, r"F 1 times, I 1 times of chunk 0"),
        ("0F0 0F1\n 1F0 1B0 1F1 1B1", 0, r"F 1 times of chunk 0 for micro-batch 0: once forward"),
        ("0F0 0F1 0F1\n 1F0 1F1", 0, r"F 2 times of chunk 0 for micro-batch 1"),
        ("0F0 0F1 0B0 0B1\n 1F0 1B0", 1, r"nothing of chunk 1 for micro-batch 1"),
        ("0F0 0F1 0B0 0B1 0F2\n 1F0 1B0 1F1 1B1", 0, r"0F2, but there are .* 2 micro-batches"),
        ("0F0 0F1 0B0 1B1\n 1F0 1B0 1F1 0B1", 0, r"1B1, but stage 1 holds chunk 1"),
        ("0F0+0F1 0B0 0B1\n 1F0 1B0 1F1 1B1", 0, r"a visit is one work, or .* not '0F0\+0F1'"),
        (
            "0F0 0B0 0F1 0B1\n 1F0 1F1 1B0 1B1",
            0,
            r"deadlock: waits at visit 1, '0B0', for 1I0, which nobody can reach",
        ),
        ("0F0 0F1 0W0 0I0 0B1\n 1F0 1B0 1F1 1B1", 0, r"'0W0', for 0I0, which nobody"),
        ("0B0 0F0 0F1 0B1\n 1F0 1B0 1F1 1B1", 0, r"'0B0', for 0F0, 1I0, which nobody"),
        (
            "0F1 0F0 0B0 0B1\n 1F1 1F0 1B0 1B1",
            0,
            r"0F0 comes after micro-batch 1 on its way forward: a chunk takes them in order",
        ),
        (
            "0F0 0F1 0I0 0I1 0W1 0W0\n 1F0 1B0 1F1 1B1",
            0,
            r"0W0 comes after micro-batch 1 on its way to the gradients of weights",
        ),
        (
            "0F0 0F1 0B1 0B0\n 1F0 1F1 1B1 1B0",
            0,
            r"0B0 comes after micro-batch 1 on its way backward",
        ),
    ],
)
def test_a_schedule_that_cannot_be_carried_out_is_refused_with_an_arrow(
    rows: str, row: int, message: str
) -> None:
    schedule = replace(one_f_one_b(2, 2), name="mine", visits=table(rows))
    _refused(schedule, row, message)


def _refused(schedule: Schedule, row: int, message: str) -> None:
    with pytest.raises(ScheduleError, match=message) as error:
        verify(schedule)
    marked = [line for line in str(error.value).splitlines() if "<--" in line]
    assert len(marked) == 1 and marked[0].startswith(f"stage {row} " if row >= 0 else "schedule")


def _held(schedule: Schedule, ahead: int) -> bool:
    """Whether some stage waits for ever where senders wait for receives after `ahead` walks."""
    rows = [walks(row) for row in schedule.visits]
    of = {
        (done_as(work), stage): number
        for stage, row in enumerate(rows)
        for number, walk in enumerate(row)
        for works in walk
        for work in works
    }
    waits: dict[tuple[int, int, str], set[tuple[int, int, str]]] = {}
    for stage, row in enumerate(rows):
        for number, walk in enumerate(row):
            waits[stage, number, "begin"] = {(stage, number - 1, "end")} if number else set()
            waits[stage, number, "end"] = {(stage, number, "begin")}
            for work in (work for works in walk for work in works):
                for before in schedule.before(work):
                    source = schedule.placement.stage_of[before.chunk]
                    if (source, of[before, source]) != (stage, number):
                        waits[stage, number, "end"].add((source, of[before, source], "end"))
                    late = of[before, source] + ahead
                    if source != stage and late < len(rows[source]) and number:
                        waits.setdefault((source, late, "wait"), set()).add(
                            (stage, number - 1, "begin")
                        )
    for (stage, number, kind), before in list(waits.items()):
        if kind == "wait":
            waits[stage, number, "begin"] |= before
            del waits[stage, number, "wait"]
    try:
        TopologicalSorter(waits).prepare()
    except CycleError:
        return True
    return False


@pytest.mark.parametrize("name", SCHEDULES)
def test_senders_wait_for_receives_no_earlier_than_they_can_be_there(name: str) -> None:
    for stages, micro_batches in ((1, 4), (2, 4), (2, 12), (3, 9), (4, 8), (8, 16), (8, 32)):
        schedule = SCHEDULES[name](stages, micro_batches)
        for own in (schedule, schedule.forward_only()):
            assert not _held(own, sends_ahead(own))
        if name == "fold":
            assert sends_ahead(schedule) == 2
    assert _held(zero_bubble_v(4, 8), 2) and sends_ahead(zero_bubble_v(4, 8)) == 10


def test_senders_that_begin_walks_at_the_same_moment_do_not_wait_for_each_other_for_ever() -> None:
    """Each would wait for a receive that the other posts after its own waiting, were it 2 walks."""
    for seed in (192, 300, 395):
        schedule = random_schedule(seed, Placement.folded(2), 3)
        verify(schedule)
        assert sends_ahead(schedule) == 3


def test_messages_that_cross_on_an_edge_are_refused() -> None:
    """Chunks 1 and 3 of stage 1 want their inputs in another order than stage 0 sends them."""
    rows = table("""
        0F0 2F0 0F1 2F1
        1F0 1F1 3F0 3F1
    """)
    crossed = Schedule("crossed", 2, Placement.straight(2, 2), rows)
    _refused(crossed, 1, r"message 1 of edge forward 0→1 is 2F0, but 0F1 is received")


def test_a_stage_without_a_chunk_is_refused() -> None:
    idle = Schedule("idle", 1, Placement((0, 2)), (*table("0F0 0B0"), (), *table("1F0 1B0")))
    _refused(idle, -1, "every one of 3 stages needs a chunk")


def test_work_reads_its_own_print() -> None:
    for row in zero_bubble_v(3, 12).visits:
        for (work,) in row:
            assert Work.parse(str(work)) == work
    with pytest.raises(ScheduleError, match="'0X1' is no work"):
        Work.parse("0X1")


def test_a_schedule_prints_a_row_for_each_stage_and_parses_back() -> None:
    text = """
        schedule 1f1b: 1 micro-batch, chunks on stages 0 1
        stage 0  0F0 0B0
        stage 1  1F0 1B0
    """
    assert str(one_f_one_b(2, 1)).splitlines() == [line.strip() for line in text.split("\n")[1:-1]]
    assert Schedule.parse(text) == one_f_one_b(2, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"expected 'schedule NAME: .*\n\(empty text\)   <-- expected"),
        ("plan x", "plan x   <-- expected 'schedule NAME"),
        (
            "schedule x: 1 micro-batch, chunks on stages 0 1\nstage 0  0F0",
            "<-- 1 rows for 2 stages",
        ),
        ("schedule x: 1 micro-batch, chunks on stages 0\nstage 1  0F0", "<-- expected 'stage 0'"),
        ("schedule x: 1 micro-batch, chunks on stages 0\nstage 0  0F0 F1", "<-- 'F1' is no work"),
    ],
)
def test_what_is_no_schedule_is_refused_with_an_arrow(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule.parse(text)


def test_placements() -> None:
    assert Placement.folded(3).stage_of == (0, 1, 2, 2, 1, 0)
    assert Placement.straight(2, 2).stage_of == (0, 1, 0, 1)
    assert Placement.folded(3).held(1) == (1, 4) and Placement.straight(2, 2).held(1) == (1, 3)
    assert Placement.folded(1).is_folded and not Placement.straight(2).is_folded


def test_schedules_have_the_names_under_which_they_are_chosen() -> None:
    assert {name: make(2, 4).name for name, make in SCHEDULES.items()} == {n: n for n in SCHEDULES}


def test_the_schedule_of_the_guide_can_be_carried_out() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "pipelines.md").read_text()
    (shown,) = (part for part in guide.split("```text\n") if part.startswith("schedule "))
    verify(Schedule.parse(shown.split("```")[0]))
