"""Schedules whose chunks go round: stage s holds chunks s, s + P, s + 2P …"""

from __future__ import annotations

from lightning_dhellam.pipeline.schedules.schedule import Schedule
from lightning_dhellam.pipeline.schedules.work import Part, ScheduleError, Visit, one
from lightning_dhellam.plan.placement import Placement


def check_numbers(stages: int, micro_batches: int) -> None:
    """Refuse numbers below one with a `ScheduleError`."""
    for name, number in (("stages", stages), ("micro_batches", micro_batches)):
        if number < 1:
            raise ScheduleError(f"{name}={number} must be at least 1")


def one_f_one_b(stages: int, micro_batches: int) -> Schedule:
    """Make 1F1B, one forward, one backward: a stage keeps as many micro-batches as stages follow.

    Source: PipeDream-flush (arXiv 2006.09503, section 2.2). It is defined for every number of
    stages and micro-batches.
    """
    check_numbers(stages, micro_batches)
    rows = []
    for stage in range(stages):
        forward = [one(stage, Part.FORWARD, k) for k in range(micro_batches)]
        backward = [one(stage, Part.BACKWARD, k) for k in range(micro_batches)]
        rows.append(_in_turn(forward, backward, min(stages - 1 - stage, micro_batches)))
    return Schedule("1f1b", micro_batches, Placement.straight(stages), tuple(rows))


def interleaved_1f1b(stages: int, micro_batches: int, rounds: int = 2) -> Schedule:
    """Make 1F1B over `rounds` chunks a stage: P micro-batches meet one chunk, then the next.

    Source: Megatron-LM (arXiv 2104.04473, section 2.2), whose warm-up it has. It is made for a
    multiple of P micro-batches; others leave out the works of those that are missing.

    Raises:
        ScheduleError: `rounds` is below 1.
    """
    check_numbers(stages, micro_batches)
    if rounds < 1:
        raise ScheduleError(f"rounds={rounds} must be at least 1")
    made = -(-micro_batches // stages) * stages
    turns = [
        (group + k, chunk)
        for group in range(0, made, stages)
        for chunk in range(rounds)
        for k in range(stages)
    ]
    rows = []
    for stage in range(stages):
        forward = [one(c * stages + stage, Part.FORWARD, k) for k, c in turns]
        backward = [one((rounds - 1 - c) * stages + stage, Part.BACKWARD, k) for k, c in turns]
        warm_up = 2 * (stages - 1 - stage) + (rounds - 1) * stages
        if made == stages:
            # Megatron lets everything go forward first when there is one group only.
            warm_up = len(forward)
        rows.append(_in_turn(forward, backward, min(warm_up, len(forward))))
    placement = Placement.straight(stages, rounds)
    whole = Schedule("interleaved-1f1b", made, placement, tuple(rows))
    return whole.of_first(micro_batches)


def _in_turn(forward: list[Visit], backward: list[Visit], warm_up: int) -> tuple[Visit, ...]:
    """Return `warm_up` forwards, then one forward and one backward in turn, then what is left."""
    row = forward[:warm_up]
    for ahead, behind in zip(forward[warm_up:], backward, strict=False):
        row += [ahead, behind]
    return tuple(row + backward[len(forward) - warm_up :])
