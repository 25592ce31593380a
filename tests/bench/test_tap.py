"""A tap carries collectives, lets nothing through, or repeats them alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_dhellam.bench.tap import Tap
from lightning_dhellam.parallel.work import Once, Work


class Counting:
    """A transport from a rank that sends threes."""

    def __init__(self) -> None:
        self.carried: list[tuple[str, tuple[int, ...]]] = []
        self.waited = 0

    def all_gather(self, x: Tensor, out: Tensor) -> Work | None:
        self.carried.append(("gather", tuple(x.shape)))
        out.copy_(torch.cat([x, torch.full_like(x, 3)]))
        return Once([], self._count)

    def reduce_scatter(self, x: Tensor, out: Tensor) -> Work | None:
        self.carried.append(("scatter", tuple(x.shape)))
        out.copy_(x[: len(out)] + 3)
        return Once([], self._count)

    def _count(self) -> None:
        self.waited += 1


def step_over(tap: Tap) -> Tensor:
    """A gather and a scatter of ones; the sum of what arrived."""
    gathered, scattered = torch.empty(4, 2), torch.empty(1, 2)
    for work in (
        tap.all_gather(torch.ones(2, 2), gathered),
        tap.reduce_scatter(torch.ones(2, 2), scattered),
    ):
        assert work is not None
        work.wait()
    return gathered.sum() + scattered.sum()


def test_collectives_go_through() -> None:
    transport = Counting()
    assert step_over(Tap(transport, 2)) == 4 + 12 + 8
    assert transport.waited == 2


def test_a_silent_step_sends_nothing_and_the_next_one_does() -> None:
    transport = Counting()
    tap = Tap(transport, 2)
    assert tap.silent(lambda: step_over(tap))() == 8 + 4, "this rank's numbers stand for all"
    assert not transport.carried
    step_over(tap)
    assert len(transport.carried) == 2


def test_a_step_that_fails_in_silence_does_not_silence_others() -> None:
    transport = Counting()
    tap = Tap(transport, 2)

    def fail() -> Tensor:
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        tap.silent(fail)()
    step_over(tap)
    assert len(transport.carried) == 2


def test_collectives_are_repeated_alone() -> None:
    transport = Counting()
    tap = Tap(transport, 2)
    alone = tap.alone(lambda: step_over(tap))
    once = list(transport.carried)
    for times in (2, 3):
        alone()
        assert transport.carried == once * times
        assert transport.waited == 2 * times
    assert once == [("gather", (2, 2)), ("scatter", (2, 2))]
