"""A tap carries collectives, lets nothing through, or repeats them alone."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from benchmarks.two_hosts.tap import Tap
from lightning_dhellam.parallel.communicator import Communicator
from lightning_dhellam.parallel.work import Once, Work
from lightning_dhellam.plan import Collective, Lane


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

    def exchange(
        self, sent: Sequence[Tensor], received: Sequence[Tensor], target: int, source: int
    ) -> Work | None:
        self.carried.append(("exchange", tuple(sent[0].shape)))
        for out in received:
            out.fill_(3)
        return Once([], self._count)

    def all_to_all(
        self,
        sent: Sequence[Tensor],
        received: Sequence[Tensor],
        given: Sequence[int],
        taken: Sequence[int],
    ) -> Work | None:
        self.carried.append(("all_to_all", tuple(sent[0].shape)))
        for x, out in zip(sent, received, strict=True):
            out.copy_(torch.cat([x[: given[0]], torch.full((taken[1], *x.shape[1:]), 3.0)]))
        return Once([], self._count)

    def processors(self, collective: Collective) -> int:
        return 7

    def _count(self) -> None:
        self.waited += 1


def _tap(transport: Counting) -> Tap:
    group = ProcessGroup(0, 2)  # type: ignore[call-arg]
    return Tap(Communicator(Lane.TP, group, transport, 0, 2))


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
    assert step_over(_tap(transport)) == 4 + 12 + 8
    assert transport.waited == 2


def test_a_silent_step_sends_nothing_and_the_next_one_does() -> None:
    transport = Counting()
    tap = _tap(transport)
    assert tap.silent(lambda: step_over(tap))() == 8 + 4, "this rank's numbers stand for all"
    assert not transport.carried
    step_over(tap)
    assert len(transport.carried) == 2


def test_a_step_that_fails_in_silence_does_not_silence_others() -> None:
    transport = Counting()
    tap = _tap(transport)

    def fail() -> Tensor:
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        tap.silent(fail)()
    step_over(tap)
    assert len(transport.carried) == 2


def test_collectives_are_repeated_alone() -> None:
    transport = Counting()
    tap = _tap(transport)
    alone = tap.alone(lambda: step_over(tap))
    once = list(transport.carried)
    for times in (2, 3):
        alone()
        assert transport.carried == once * times
        assert transport.waited == 2 * times
    assert once == [("gather", (2, 2)), ("scatter", (2, 2))]


def _exchanged(tap: Tap) -> tuple[float, float]:
    x, (y, z) = torch.ones(3, 2), (torch.empty(3, 2), torch.empty(5, 2))
    works = tap.exchange([x], [y], 1, 1), tap.all_to_all([x], [z], [1, 2], [1, 4])
    for work in works:
        assert work is not None
        work.wait()
    return y.sum().item(), z.sum().item()


def test_what_goes_from_rank_to_rank_goes_through_is_silenced_and_repeated_too() -> None:
    transport = Counting()
    tap = _tap(transport)
    assert _exchanged(tap) == (18, 2 + 24) and transport.waited == 2
    tap.silent(lambda: torch.tensor(_exchanged(tap)))()
    assert len(transport.carried) == 2
    alone = tap.alone(lambda: torch.tensor(_exchanged(tap)))
    alone()
    assert transport.carried == [("exchange", (3, 2)), ("all_to_all", (3, 2))] * 3
    assert tap.processors(Collective.ALL_GATHER) == 7
