"""Which way keys and values take between the ranks that share sequences: the faster one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lightning_dhellam.engine import MicroBatch
from lightning_dhellam.parallel.collectives import largest
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
    """
    seconds = []
    for name in runner.agreed.exchanges:
        runner.agreed.exchange(name)
        layers, costs = runner.engine.layers, Costs.of(profiled())
        solution = solve(
            layers, costs, tokens=tokens, memory_limit=memory_limit, memory_slack=memory_slack
        )
        step = simulate(layers, solution.builder(), costs, micro_batches=len(pieces), tokens=tokens)
        seconds.append(step.seconds)
    # Stages take the same, by the one that takes longest.
    slowest = largest(torch.tensor(seconds, dtype=torch.float64), runner.context.world_group)
    fastest = runner.agreed.exchanges[int(slowest.argmin())]
    runner.agreed.exchange(fastest)
    return fastest
