"""The sides of the pipeline benchmark, as one process of the pipeline runs them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dhellam.bench.megatron_side import MegatronSide
from lightning_dhellam.bench.pipeline.report import MEGATRON, Measured
from lightning_dhellam.bench.pipeline.settings import Settings
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.runner import Runner

_CPU = torch.device("cpu")
_WARM_UP = 1


class Side(NamedTuple):
    """One way to run a step.

    Attributes:
        step: Forward and backward from cleared gradients; gives this rank's loss.
        sums: Makes of that loss those of the whole model: its loss, and its gradient's norm.
    """

    step: Callable[[], Tensor]
    sums: Callable[[Tensor], tuple[float, float]]


def measure_sides(settings: Settings) -> dict[str, Measured]:
    """Time every side in turn. torch.distributed is initialised, and has a rank for each stage."""
    context = ParallelContext.create(_CPU, pipeline_parallel_size=settings.stages)
    sides = {
        "folded, two strands": _folded(settings, context, "interleaved"),
        "folded, sequential": _folded(settings, context, "sequential"),
        MEGATRON: _megatron(settings, context),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    losses = {}
    for _ in range(_WARM_UP + settings.steps):
        # In turn, so that what else the machine does meets all sides alike.
        for name, side in sides.items():
            taken, losses[name] = _timed(side)
            seconds[name].append(taken)
    found = {
        name: Measured(seconds[name][_WARM_UP:], *side.sums(losses[name]))
        for name, side in sides.items()
    }
    context.destroy()
    return found


def _timed(side: Side) -> tuple[float, Tensor]:
    dist.barrier()
    begin = time.perf_counter()
    loss = side.step()
    dist.barrier()
    return time.perf_counter() - begin, loss


def _folded(settings: Settings, context: ParallelContext, plan: str) -> Side:
    """Our side, under one of the built-in plans."""
    runner = Runner(CausalLM(settings.config, context), plan=plan)
    # Gradients belong to an optimizer. It never steps: all sides keep the weights they start from.
    runner.optimizer(torch.optim.SGD(runner.model.parameters(), lr=1.0))
    batch = settings.batch()

    def sums(loss: Tensor) -> tuple[float, float]:
        return loss.item(), runner.grad_norm().item()

    return Side(lambda: runner.train(batch), sums)


def _megatron(settings: Settings, context: ParallelContext) -> Side:
    """Megatron-core's side, whose loss is on its last stage alone."""
    theirs = MegatronSide(settings.config, context, settings.batch(), 1)

    def sums(loss: Tensor) -> tuple[float, float]:
        square = torch.stack([grad.square().sum() for grad in theirs.gradients()]).sum()
        total = torch.stack([loss.reshape(()), square])
        dist.all_reduce(total)
        return total[0].item(), total[1].sqrt().item()

    return Side(theirs.step, sums)
