"""What a measurement does when the host cannot keep up, and when results are no numbers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from lightning_dhellam.engine import OperatorTimer, Subject, make_lanes
from lightning_dhellam.engine.timing import _equal_bits
from lightning_dhellam.plan import Lane, Operator


def _timer(monkeypatch: pytest.MonkeyPatch, needed: int) -> tuple[OperatorTimer, list[int]]:
    """A timer on a host that is late with a head start below `needed`, and the head starts."""
    timer = OperatorTimer(make_lanes(torch.device("cpu")), None, repeats=3, warmup=1)
    starts: list[int] = []

    def timed(subjects: Sequence[Subject], lead: float) -> list[float]:
        starts.append(timer._head_start)
        late = timer._head_start < needed
        return [2.0 if late else 1.0 for _ in subjects] + [float(late)]

    monkeypatch.setattr(timer, "_time", timed)
    return timer, starts


SUBJECT = Subject(Operator("gemm", Lane.COMPUTE, (), (), lambda: None), ())


def test_a_host_that_is_late_measures_again_with_a_longer_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timer, starts = _timer(monkeypatch, needed=1_500_000)
    assert timer.alone(SUBJECT) == [1.0] * 3
    assert starts == [500_000] * 4 + [1_000_000] * 4 + [2_000_000] * 4
    # The next measurement begins with what the host has been found to need.
    assert timer.beside(SUBJECT, SUBJECT) == ([1.0] * 3, [1.0] * 3)
    assert starts[12:] == [2_000_000] * 4


def test_a_host_that_is_always_late_gets_its_times_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timer, starts = _timer(monkeypatch, needed=10**12)
    assert timer.alone(SUBJECT) == [2.0] * 3
    assert max(starts) == 16_000_000


def test_bits_are_compared_where_numbers_cannot_be() -> None:
    lost = torch.tensor([1.0, float("nan")])
    assert _equal_bits(lost, lost.clone())
    assert not _equal_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert _equal_bits(torch.ones(2, 3).T, torch.ones(3, 2))
