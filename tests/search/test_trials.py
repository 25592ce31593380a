"""Which plan is tried when, and what counts."""

from __future__ import annotations

import pytest

from lightning_dhellam.search.measure import Trials
from lightning_dhellam.search.report import Outcome, measured

NAMES = ("a", "b", "c")


def run(trials: Trials, steps: int) -> list[str]:
    """Take `steps` steps, the n-th of n seconds; the candidates in their order."""
    tried = []
    for number in range(steps):
        tried.append(trials.next())
        trials.add(lambda number=number: float(number))  # type: ignore[misc]
    return tried


def test_every_round_tries_all_and_begins_with_another() -> None:
    trials = Trials(NAMES, 2)
    assert trials.total == trials.left == 9
    assert run(trials, 9) == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert trials.left == 0


def test_the_first_round_does_not_count() -> None:
    trials = Trials(NAMES, 2)
    run(trials, 9)
    assert trials.table() == [[5.0, 7.0], [3.0, 8.0], [4.0, 6.0]]


@pytest.mark.parametrize(("steps", "counted"), [(0, 0), (3, 0), (5, 0), (6, 1), (8, 1), (9, 2)])
def test_only_whole_rounds_count(steps: int, counted: int) -> None:
    trials = Trials(NAMES, 2)
    run(trials, steps)
    assert trials.counted == counted
    assert [len(row) for row in trials.table()] == [counted] * 3


def test_outcomes_get_medians_and_half_the_spread() -> None:
    outcomes = [Outcome(name, 1.0, {}) for name in NAMES[:2]]
    fast, slow = measured(outcomes, [[1.0, 2.0, 9.0, 2.0, 3.0], [4.0, 4.0, 4.0, 4.0, 4.0]])
    assert (fast.measured, slow.measured, slow.spread) == (2.0, 4.0, 0.0)
    assert fast.spread == pytest.approx((4.2 - 1.8) / 2)
