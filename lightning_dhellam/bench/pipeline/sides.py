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
from lightning_dhellam.bench.workload import give_gradients
from lightning_dhellam.engine import Engine, cut, make_lanes
from lightning_dhellam.layers import lower
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import ParallelContext, Topology
from lightning_dhellam.plan import builder

_CPU = torch.device("cpu")
_WARM_UP = 1


class Side(NamedTuple):
    """One way to run a step.

    Attributes:
        step: Forward and backward from cleared gradients; gives the loss, 0 on a stage without it.
        gradients: Gives the gradients of this rank's parameters.
    """

    step: Callable[[], Tensor]
    gradients: Callable[[], list[Tensor]]


def measure_sides(settings: Settings) -> dict[str, Measured]:
    """Time every side in turn. torch.distributed is initialised, and has a rank for each stage."""
    context = ParallelContext.create(_CPU, pipeline_parallel_size=settings.stages)
    theirs = MegatronSide(settings.config, context, settings.batch(), 1)
    with context.megatron():
        sides = {
            "folded, two strands": _folded(settings, context, "interleaved"),
            "folded, sequential": _folded(settings, context, "sequential"),
            MEGATRON: Side(theirs.step, theirs.gradients),
        }
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        losses = {}
        for _ in range(_WARM_UP + settings.steps):
            # In turn, so that what else the machine does meets all sides alike.
            for name, side in sides.items():
                taken, losses[name] = _timed(side)
                seconds[name].append(taken)
    context.destroy()
    return {
        name: Measured(seconds[name][_WARM_UP:], *_sums(losses[name], side.gradients()))
        for name, side in sides.items()
    }


def _timed(side: Side) -> tuple[float, Tensor]:
    dist.barrier()
    begin = time.perf_counter()
    loss = side.step()
    dist.barrier()
    return time.perf_counter() - begin, loss


def _sums(loss: Tensor, gradients: list[Tensor]) -> tuple[float, float]:
    """Loss and gradient norm of the whole model."""
    square = torch.stack([gradient.square().sum() for gradient in gradients]).sum()
    total = torch.stack([loss.reshape(()), square])
    dist.all_reduce(total)
    return total[0].item(), total[1].sqrt().item()


def _folded(settings: Settings, context: ParallelContext, plan: str) -> Side:
    model = CausalLM(settings.config, context)
    give_gradients(model)
    grads: list[Tensor] = [p.main_grad for p in model.parameters()]  # type: ignore[attr-defined]
    lowered = lower(model)
    engine = Engine(lowered.layers, make_lanes(_CPU), builder(plan), stage=lowered.stage)
    engine.suit(settings.sequence)

    def step() -> Tensor:
        for grad in grads:
            grad.zero_()
        batch = settings.batch()
        return engine.train(cut(batch, 1, device=_CPU, seed=1, step=0, topology=Topology()))

    return Side(step, lambda: grads)
