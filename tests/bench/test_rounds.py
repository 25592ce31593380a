"""Times in turn, and results compared."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import Parameter

from lightning_dhellam.bench.rounds import Result, Step, Timer, Times, in_turn, result_of


def test_steps_are_timed_in_turn_and_the_first_round_does_not_count() -> None:
    ran = []

    def step(name: str) -> torch.Tensor:
        ran.append(name)
        return torch.zeros(())

    sides = {
        name: (lambda name=name: step(name), lambda name=name: step(name.upper()))
        for name in "abcdef"
    }
    times = in_turn(sides, Timer(torch.device("cpu")), rounds=4)
    pairs = [a + b for a, b in zip(ran[::2], ran[1::2], strict=True)]
    assert all(pair == pair[0] + pair[0].upper() for pair in pairs), "a side's steps go together"
    order = "".join(pair[0] for pair in pairs)
    rounds = [order[start : start + 6] for start in range(0, 30, 6)]
    assert rounds[0] == "abcdef"
    assert all(sorted(one) == list("abcdef") for one in rounds)
    before = {name: {a for a, b in pairwise(order[6:]) if b == name} for name in "abcdef"}
    assert all(len(names) > 1 for names in before.values()), "one is always behind the same one"
    assert list(times) == list("abcdef")
    counts = {len(t.seconds) for pair in times.values() for t in pair}
    assert counts == {4}
    assert all(seconds > 0 for pair in times.values() for t in pair for seconds in t.seconds)


def test_a_gpu_runs_a_side_until_its_clock_has_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    seconds = {"few": 0.1, "many": 0.25}
    first = {"few": 1.0, "many": 2.0}  # it takes memory, and loads kernels

    def step(name: str) -> torch.Tensor:
        ran.append(name)
        return torch.zeros(())

    def timed(self: Timer, run: Step) -> float:
        run()
        return first.pop(ran[-1], seconds[ran[-1]])

    monkeypatch.setattr(Timer, "seconds", timed)
    pair = (lambda: step("few"), lambda: step("many"))
    times = in_turn({"a": pair}, Timer(torch.device("cuda")), rounds=2)
    assert ran == ["few", "many", *(["many"] * 3 + ["few", "many"]) * 2]
    assert [t.median for t in times["a"]] == [0.1, 0.25]


def test_the_median_counts_and_the_spread_is_half_of_p20_to_p80() -> None:
    times = Times((1.0, 2.0, 3.0, 4.0, 100.0))
    assert times.median == 3.0
    assert times.spread == pytest.approx((23.2 - 1.8) / 2)


def test_results_are_bitwise_equal_or_a_relative_error_apart() -> None:
    one = Result(torch.tensor(2.0), (torch.tensor([3.0, 4.0]),))
    assert one.distance(one) == 0.0
    other = Result(torch.tensor(2.0), (torch.tensor([3.0, 4.5]),))
    assert other.distance(one) == pytest.approx(0.1)


def test_a_result_starts_from_empty_gradients() -> None:
    parameter = Parameter(torch.zeros(2))
    parameter.main_grad = torch.ones(2)  # type: ignore[attr-defined]

    def step() -> torch.Tensor:
        parameter.main_grad.add_(5)  # type: ignore[attr-defined]
        return torch.tensor(1.0)

    result = result_of(step, [parameter])
    assert result.gradients[0].tolist() == [5.0, 5.0]
