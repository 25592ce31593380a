"""Our named schedules against those of `torch.distributed.pipelining`, action by action."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from torch.distributed.pipelining import schedules as theirs

from lightning_dhellam.pipeline.schedules import (
    Part,
    Placement,
    Schedule,
    Visit,
    Work,
    dual_pipe_v,
    interleaved_1f1b,
    one_f_one_b,
    verify,
    zero_bubble_v,
)
from lightning_dhellam.search.pipeline import Link, UniformCosts, play

_PARTS = {
    "FORWARD": Part.FORWARD,
    "FULL_BACKWARD": Part.BACKWARD,
    "BACKWARD_INPUT": Part.INPUT,
    "BACKWARD_WEIGHT": Part.WEIGHT,
}
SIZES = [(stages, number) for stages in (2, 4, 8) for number in (stages, 2 * stages, 3 * stages)]


def order_of(kind: type, placement: Placement, micro_batches: int, **fields: Any) -> Schedule:
    """The actions of each rank, which torch computes of these numbers: no process takes part."""
    stages = placement.stages
    known = {
        "pp_group_size": stages,
        "_n_microbatches": micro_batches,
        "num_stages": placement.chunks,
    }
    made = kind.__new__(kind)
    made.__dict__ |= known | fields
    rows = [made._calculate_single_rank_operations(rank) for rank in range(stages)]
    return _schedule(kind.__name__, placement, micro_batches, rows)


def _schedule(name: str, placement: Placement, micro_batches: int, rows: Any) -> Schedule:
    visits = tuple(
        tuple(_visit(action) for action in row if action is not None and _is_work(action))
        for row in rows
    )
    return Schedule(name, micro_batches, placement, visits)


def _is_work(action: Any) -> bool:
    return action.computation_type.name in (*_PARTS, "OVERLAP_F_B")


def _visit(action: Any) -> Visit:
    return tuple(
        Work(one.stage_index, _PARTS[one.computation_type.name], one.microbatch_index)
        for one in action.sub_actions or (action,)
    )


def zbv(stages: int, micro_batches: int) -> Schedule:
    return order_of(theirs.ScheduleZBVZeroBubble, Placement.folded(stages), micro_batches)


def dual(stages: int, micro_batches: int) -> Schedule:
    return order_of(theirs.ScheduleDualPipeV, Placement.folded(stages), micro_batches)


def interleaved(stages: int, micro_batches: int) -> Schedule:
    rounds = max(1, micro_batches // stages)
    return order_of(
        theirs.ScheduleInterleaved1F1B,
        Placement.straight(stages, 2),
        micro_batches,
        n_local_stages=2,
        number_of_rounds=rounds,
        microbatches_per_round=micro_batches // rounds,
    )


def straight(stages: int, micro_batches: int) -> Schedule:
    known = SimpleNamespace(_num_stages=stages, _n_microbatches=micro_batches)
    rows = theirs.Schedule1F1B._get_pipeline_order(known)
    placement = Placement.straight(stages)
    made = _schedule("1F1B", placement, micro_batches, [rows[rank] for rank in range(stages)])
    last = made.visits[-1]
    if last[0][0].micro_batch == 1:
        # In what torch 2.13 prints the last rank's forwards are numbered from 1; it runs from 0.
        last = tuple(tuple(map(_renumbered, works)) for works in last)
    return replace(made, visits=(*made.visits[:-1], last))


def _renumbered(work: Work) -> Work:
    return replace(work, micro_batch=work.micro_batch - (work.part is Part.FORWARD))


@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_zero_bubble_v_is_torchs(stages: int, micro_batches: int) -> None:
    assert zero_bubble_v(stages, micro_batches).visits == zbv(stages, micro_batches).visits


@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_dual_pipe_v_is_torchs(stages: int, micro_batches: int) -> None:
    """Torch makes it for two micro-batches a stage at least; of fewer, we leave out the others."""
    if micro_batches >= 2 * stages:
        assert dual_pipe_v(stages, micro_batches).visits == dual(stages, micro_batches).visits


@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_1f1b_is_torchs(stages: int, micro_batches: int) -> None:
    assert one_f_one_b(stages, micro_batches).visits == straight(stages, micro_batches).visits


@pytest.mark.parametrize(("stages", "micro_batches"), SIZES)
def test_interleaved_1f1b_is_torchs_but_for_one_group(stages: int, micro_batches: int) -> None:
    """With as many micro-batches as stages Megatron lets everything go forward first, and we with
    it. Torch does not, which takes as long, in less memory on the last stages."""
    ours, torchs = interleaved_1f1b(stages, micro_batches), interleaved(stages, micro_batches)
    if micro_batches > stages:
        assert ours.visits == torchs.visits
        return
    assert ours.visits != torchs.visits
    verify(torchs)
    costs = UniformCosts(1.0, 1.1, 0.9, message=0.02)
    for link in (Link(), Link(1.0, 0.01)):
        assert play(ours, costs, link).seconds <= play(torchs, costs, link).seconds * (1 + 1e-9)


@pytest.mark.parametrize("make", [zbv, dual, interleaved, straight])
def test_what_torch_orders_can_be_carried_out(make: Any) -> None:
    for stages, micro_batches in SIZES:
        if micro_batches >= 2 * stages:
            schedule = make(stages, micro_batches)
            verify(schedule)
            assert Schedule.parse(str(replace(schedule, name="torch"))).visits == schedule.visits
