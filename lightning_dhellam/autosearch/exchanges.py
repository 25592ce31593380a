"""Which way keys and values take between the ranks that share sequences: the faster one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

import torch

from lightning_dhellam.engine import MicroBatch
from lightning_dhellam.parallel.collectives import largest, together
from lightning_dhellam.runner import Runner
from lightning_dhellam.search.measure import Profile
from lightning_dhellam.search.model import Costs, simulate
from lightning_dhellam.search.solve import solve


def take_fastest(
    runner: Runner,
    pieces: Sequence[MicroBatch],
    profiled: Callable[[], Profile],
    *,
    tokens: int,
    memory_limit: float | None,
    memory_slack: float | None,
) -> str:
    """Let keys and values come by the way with the shortest step, as predicted from a profile each.

    Every rank must call this.

    Args:
        runner: that trains.
        pieces: the micro-batches of a step.
        profiled: measures the operators that there are now.
        tokens: of a micro-batch.
        memory_limit: see `Options`.
        memory_slack: in bytes.

    Returns the name of the way.

    Raises:
        ValueError: by no way an order keeps the memory limit.
    """
    world = runner.context.world_group

    def predicted() -> float:
        layers, costs = runner.engine.layers, Costs.of(profiled())
        try:
            solution = solve(
                layers, costs, tokens=tokens, memory_limit=memory_limit, memory_slack=memory_slack
            )
        except ValueError as error:
            refusals.append(error)  # no order fits: another way may
            return inf
        builder, count = solution.builder(), len(pieces)
        return simulate(layers, builder, costs, micro_batches=count, tokens=tokens).seconds

    refusals: list[ValueError] = []
    seconds = []
    for name in runner.agreed.exchanges:
        runner.agreed.exchange(name)
        seconds.append(together(predicted, world))
    # Stages take the same, by the one that takes longest.
    slowest = largest(torch.tensor(seconds, dtype=torch.float64), world)
    if slowest.isinf().all():
        raise ValueError(str(refusals[0]) if refusals else "no plan of another stage fits")
    fastest = runner.agreed.exchanges[int(slowest.argmin())]
    runner.agreed.exchange(fastest)
    return fastest
