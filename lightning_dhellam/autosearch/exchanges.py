"""Which way keys and values take between the ranks that share sequences: the faster one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from math import inf
from typing import NamedTuple

import torch

from lightning_dhellam.engine import MicroBatch
from lightning_dhellam.parallel.collectives import largest, together
from lightning_dhellam.plan import BUILDERS
from lightning_dhellam.runner import Runner
from lightning_dhellam.search.measure import Profile
from lightning_dhellam.search.model import Costs, simulate
from lightning_dhellam.search.solve import peak_bytes, solve


class Taken(NamedTuple):
    """The way that was taken.

    Attributes:
        name: of it.
        profile: of the operators by it.
        memory_limit: bytes that its plans may take at once in a pair of layers.
    """

    name: str
    profile: Profile
    memory_limit: float


def take_fastest(
    runner: Runner,
    pieces: Sequence[MicroBatch],
    profiled: Callable[[], Profile],
    *,
    tokens: int,
    memory_limit: float | None,
    memory_slack: float | None,
    ending: Callable[[], AbstractContextManager[None]],
) -> Taken:
    """Let keys and values come by the way with the shortest step, as predicted from a profile each.

    A way that needs more memory than there is is not taken: more than the limit or, where none is
    given, than the sequential plan by the first way, by which the run has begun, and the slack.
    Every rank must call this.

    Args:
        runner: that trains.
        pieces: the micro-batches of a step.
        profiled: measures the operators that there are now.
        tokens: of a micro-batch.
        memory_limit: see `Options`.
        memory_slack: in bytes, unless there is a limit.
        ending: inside, a rank that is told to end does so.

    Raises:
        ValueError: by no way an order keeps the memory limit.
        SIGTERMException: a rank was told to end; on all of them.
    """
    world = runner.context.world_group
    limit = memory_limit

    def predicted(profile: Profile) -> float:
        nonlocal limit
        layers, costs = runner.engine.layers, Costs.of(profile)
        if limit is None:
            least = peak_bytes(layers, BUILDERS["sequential"], costs, tokens=tokens)
            limit = least + (memory_slack or 0.0)
        try:
            with ending():
                solution = solve(layers, costs, tokens=tokens, memory_limit=limit)
        except ValueError as error:
            refusals.append(error)  # no order fits: another way may
            return inf
        builder, count = solution.builder(), len(pieces)
        return simulate(layers, builder, costs, micro_batches=count, tokens=tokens).seconds

    refusals: list[ValueError] = []
    profiles: list[Profile] = []
    seconds = []
    for name in runner.agreed.exchanges:
        runner.agreed.exchange(name)
        profiles.append(together(profiled, world))
        seconds.append(together(partial(predicted, profiles[-1]), world))
    # Stages take the same, by the one that takes longest.
    slowest = largest(torch.tensor(seconds, dtype=torch.float64), world)
    if slowest.isinf().all():
        raise ValueError(str(refusals[0]) if refusals else "no plan of another stage fits")
    fastest = int(slowest.argmin())
    name = runner.agreed.exchanges[fastest]
    runner.agreed.exchange(name)
    assert limit is not None
    return Taken(name, profiles[fastest], limit)
