"""Times several ways to do the same step in turn, so that a drift of the machine hits all."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from lightning_dhellam.search.measure import Samples

Step = Callable[[], Tensor]
"""Does one step and returns its loss."""

_SETTLED = 0.6
"""Seconds of a side's own steps after which a GPU's clock is that of this side. One that changes to
more work goes on at its old clock for 0.3 s, and then, over its limit of power, below the new."""


@dataclass(frozen=True)
class Timer:
    """Times a step from a common start of all ranks to the last one's end.

    Attributes:
        device: The device that computes.
        group: The ranks; None for this process alone.
    """

    device: torch.device
    group: dist.ProcessGroup | None = None

    def seconds(self, step: Step) -> float:
        """The seconds of one step, the largest of any rank."""
        self._settle()
        begin = time.perf_counter()
        step()
        self._synchronize()
        taken = torch.tensor(time.perf_counter() - begin, dtype=torch.float64)
        if self.group is not None:
            taken = taken.to(self.device)
            dist.all_reduce(taken, op=dist.ReduceOp.MAX, group=self.group)
        return taken.item()

    def _settle(self) -> None:
        self._synchronize()
        if self.group is not None:
            dist.barrier(self.group)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Times:
    """The seconds of each repetition of one step."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median of the repetitions, which is what counts."""
        return median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance from the 20th to the 80th percentile."""
        samples = Samples(self.seconds)
        return (samples.quantile(0.8) - samples.quantile(0.2)) / 2


def in_turn(
    sides: Mapping[str, Sequence[Step]], timer: Timer, rounds: int
) -> dict[str, tuple[Times, ...]]:
    """Time every step of every side once in each of `rounds` rounds. A first one does not count.

    Each round has an order of its own, the same on every rank. On a GPU, whose clock depends on
    what it did before, a side's last step runs for a while before its steps are timed.
    """
    draw = random.Random(rounds)
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in sides}
    for steps in sides.values():
        for step in steps:
            timer.seconds(step)
    for _ in range(rounds):
        for name in draw.sample(list(sides), len(sides)):
            _until_settled(sides[name][-1], timer)
            found[name].append(tuple(timer.seconds(step) for step in sides[name]))
    return {name: tuple(map(Times, zip(*rows, strict=True))) for name, rows in found.items()}


def _until_settled(step: Step, timer: Timer) -> None:
    """Run a step until a GPU's clock is that of such steps.

    By what each takes now: the first ever, which takes memory and loads kernels, says nothing.
    """
    spent = 0.0
    while timer.device.type == "cuda" and spent < _SETTLED:
        spent += timer.seconds(step)


@dataclass(frozen=True)
class Result:
    """What a step computes: its loss, and the gradient that it leaves for each parameter."""

    loss: Tensor
    gradients: tuple[Tensor, ...]

    def errors(self, other: Result) -> list[float]:
        """The relative error of the loss and of each gradient; 0 where they are bitwise equal."""
        mine, others = (self.loss, *self.gradients), (other.loss, *other.gradients)
        return [_distance(a, b) for a, b in zip(mine, others, strict=True)]

    def distance(self, other: Result) -> float:
        """The largest of the relative errors."""
        return max(self.errors(other))


def _distance(a: Tensor, b: Tensor) -> float:
    if torch.equal(a, b):
        return 0.0
    return float((a - b).float().norm() / b.float().norm().clamp_min(1e-30))


def result_of(step: Step, parameters: Sequence[Parameter]) -> Result:
    """What one step computes from empty gradients."""
    grads = [parameter.main_grad for parameter in parameters]  # type: ignore[attr-defined]
    for grad in grads:
        grad.zero_()
    loss = step()
    return Result(loss.detach().clone(), tuple(grad.clone() for grad in grads))
