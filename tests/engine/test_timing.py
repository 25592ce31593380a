"""What a measurement does when the host cannot keep up, and when results are no numbers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from lightning_dhellam.engine import OperatorTimer, Subject, make_lanes, timing
from lightning_dhellam.engine.lanes import CudaLanes
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


def test_a_sample_for_which_the_host_was_late_is_taken_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timer = OperatorTimer(make_lanes(torch.device("cpu")), None, repeats=8, warmup=1)
    lates = iter([0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0])
    monkeypatch.setattr(timer, "_time", lambda subjects, lead: [1.0 + (late := next(lates)), late])
    assert timer.alone(SUBJECT) == [1.0] * 8
    assert list(lates) == [], "nine runs, and three: of each the first does not count"
    assert timer._head_start == 500_000, "two of eight are by chance"


def test_bits_are_compared_where_numbers_cannot_be() -> None:
    lost = torch.tensor([1.0, float("nan")])
    assert _equal_bits(lost, lost.clone())
    assert not _equal_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert _equal_bits(torch.ones(2, 3).T, torch.ones(3, 2))


class _Device:
    """Clocks of a host and of a device that runs what it is given, and no earlier."""

    def __init__(self) -> None:
        self.host = 0.0
        self.device = 0.0

    def run(self, seconds: float, issue: float) -> None:
        """Something of `seconds`, which the host needs `issue` to give."""
        self.host += issue
        self.device = max(self.device, self.host) + seconds

    def event(self) -> _Moment:
        return _Moment(max(self.device, self.host))

    def wait(self, device: torch.device) -> None:
        self.host = max(self.device, self.host)


class _Moment:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def elapsed_time(self, other: _Moment) -> float:
        return (other.seconds - self.seconds) * 1000


@pytest.mark.parametrize(("issue", "rounds"), [(1e-6, 400), (5e-3, 100)])
def test_operators_run_for_as_long_as_asked_also_where_the_host_is_slower_than_they(
    issue: float, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = _Device()
    monkeypatch.setattr(timing, "_recorded", here.event)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: here.host)
    monkeypatch.setattr(torch.cuda, "synchronize", here.wait)
    timer = OperatorTimer(make_lanes(torch.device("cpu")), None)
    timer._lanes = CudaLanes.__new__(CudaLanes)
    timer._lanes.device = torch.device("cuda")
    taken = iter([0.9e-3, 0.7e-3])
    monkeypatch.setattr(timer, "_time", lambda subjects, lead: [next(taken), 0.0])
    ran: list[str] = []

    def subject(name: str, seconds: float) -> Subject:
        def run() -> None:
            ran.append(name)
            here.run(seconds, issue)

        return Subject(Operator(name, Lane.COMPUTE, (), (), run), ())

    pair = subject("short", 1e-3), subject("long", 2e-3)
    found = timer.sustained(pair, 1.2, 0.0, [pair])
    assert ran == ["short", "long"] * (len(ran) // 2)
    assert len(ran) / 2 - timing._FEWEST == pytest.approx(rounds, rel=0.25)
    assert 0 < found.share <= 1.0
    assert found.after == 0.7e-3, "the shorter of two: the host may be late for one"
