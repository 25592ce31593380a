"""The sides of the pipeline benchmark, as one process of the pipeline runs them."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dhellam.autosearch.schedules import ScheduleSearch
from lightning_dhellam.bench.megatron_side import MegatronSide
from lightning_dhellam.bench.pipeline.report import MEGATRON, Measured
from lightning_dhellam.bench.pipeline.settings import Settings
from lightning_dhellam.bench.scheduling import Measured as Shown
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.pipeline.schedules import AUTO, Scheme, scheme_of
from lightning_dhellam.runner import Runner

_CPU = torch.device("cpu")
_WARM_UP = 1
_ROUNDS = 3
"""Steps that `auto` measures each of its schedules on."""


class Side(NamedTuple):
    """One way to run a step.

    Attributes:
        step: Forward and backward from cleared gradients; gives this rank's loss.
        sums: Makes of that loss those of the whole model: its loss, and its gradient's norm.
        before: What to do before a step, in no time that counts.
    """

    step: Callable[[], Tensor]
    sums: Callable[[Tensor], tuple[float, float]]
    before: Callable[[], None] = lambda: None


def measure_sides(settings: Settings) -> dict[str, Measured]:
    """Time every side in turn. torch.distributed is initialised, and has a rank for each stage."""
    context = ParallelContext.create(_CPU, pipeline_parallel_size=settings.stages)
    sides = {**_ours(settings, context), MEGATRON: _megatron(settings, context)}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    sums: dict[str, tuple[float, float]] = {}
    for _ in range(_WARM_UP + settings.steps):
        # In turn, so that what else the machine does meets all sides alike.
        for name, side in sides.items():
            taken, loss = _timed(side)
            seconds[name].append(taken)
            sums[name] = side.sums(loss)
    found = {name: Measured(seconds[name][_WARM_UP:], *sums[name]) for name in sides}
    context.destroy()
    return found


def _timed(side: Side) -> tuple[float, Tensor]:
    side.before()
    dist.barrier()
    begin = time.perf_counter()
    loss = side.step()
    dist.barrier()
    return time.perf_counter() - begin, loss


def _ours(settings: Settings, context: ParallelContext) -> dict[str, Side]:
    """Our sides: one model, walked by one schedule after the other."""
    runner = Runner(CausalLM(settings.config, context), plan=settings.plan)
    # Gradients belong to an optimizer. It never steps: all sides keep the weights they start from.
    runner.optimizer(torch.optim.SGD(runner.model.parameters(), lr=1.0))
    batch = settings.batch()
    step = partial(runner.train, batch)

    def sums(loss: Tensor) -> tuple[float, float]:
        return loss.item(), runner.grad_norm().item()

    def walked(name: str, scheme: Scheme) -> Side:
        return Side(step, sums, partial(runner.use_schedule, name, scheme))

    sides = {}
    for name in settings.schedules:
        if name == AUTO:
            step()
            chosen, scheme = _chosen(settings, runner, step)
            sides[f"{AUTO}: {chosen}"] = walked(chosen, scheme)
        else:
            sides[name] = walked(name, scheme_of(name, settings.stages))
    return sides


def _chosen(settings: Settings, runner: Runner, step: Callable[[], Tensor]) -> tuple[str, Scheme]:
    """The schedule that is fastest of those that are predicted best."""
    shown, count = Shown.of(runner, settings.batch()), settings.micro_batches
    search = ScheduleSearch(runner, _ROUNDS, None)
    search.begin(
        shown.costs,
        shown.builder,
        shown.links,
        busy=shown.busy(runner, count),
        tokens=shown.tokens,
        count=count,
    )
    while search.left:
        search.follow_next()
        begin = time.perf_counter()
        step()
        dist.barrier()
        search.add(partial(float, time.perf_counter() - begin))
    assert search.chosen is not None
    return search.chosen.name, runner.engine.stage.scheme


def _megatron(settings: Settings, context: ParallelContext) -> Side:
    """Megatron-core's side, whose loss is on its last stage alone."""
    theirs = MegatronSide(settings.config, context, settings.batch(), 1)

    def sums(loss: Tensor) -> tuple[float, float]:
        square = torch.stack([grad.square().sum() for grad in theirs.gradients()]).sum()
        total = torch.stack([loss.reshape(()), square])
        dist.all_reduce(total)
        return total[0].item(), total[1].sqrt().item()

    return Side(theirs.step, sums)
