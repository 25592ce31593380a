"""What gathers in 8 bits would bring a run that gathers in 16: measured and told, never taken.

They change what is computed, so a search may not switch them. Where communication that they would
make shorter is exposed, operators are timed with them as well, and a plan is searched for those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

import torch

from lightning_dhellam.autosearch.candidates import Candidates
from lightning_dhellam.engine import MicroBatch
from lightning_dhellam.layers.narrower import NARROWER
from lightning_dhellam.parallel.collectives import largest, together
from lightning_dhellam.plan import Builder
from lightning_dhellam.runner import Runner
from lightning_dhellam.search.measure import Profile
from lightning_dhellam.search.model import Costs, simulate
from lightning_dhellam.search.report import Offer
from lightning_dhellam.search.solve import solve

_SEARCHED = "auto"
_MEASURED = "from operators measured here"


class Memory(NamedTuple):
    """Bytes that a plan may take in a pair of layers, or more than the sequential one does."""

    limit: float | None
    slack: float | None


def offers(
    runner: Runner,
    pieces: Sequence[MicroBatch],
    found: Candidates,
    profiled: tuple[Profile, Callable[[], Profile]],
    *,
    tokens: int,
    memory: Memory,
    ending: Callable[[], AbstractContextManager[None]],
) -> list[Offer]:
    """Measure what each such option would bring that the run has not. Every rank must call this.

    Nothing is measured for a lane of which the searched plan leaves too little exposed. An option
    whose operators cannot be timed, or for which no order keeps the memory, is not offered.

    Args:
        runner: that trains; as before when this is over.
        pieces: the micro-batches of a step.
        found: plans of the run as it is.
        profiled: the profile of its operators, and what takes one of those that there are then.
        tokens: of a micro-batch.
        memory: that plans may take.
        ending: inside, a rank that is told to end does so.

    Raises:
        SIGTERMException: a rank was told to end; on all of them.
    """
    world = runner.context.world_group
    profile, take = profiled

    def step(profile: Profile, builder: Builder | None = None) -> float:
        layers, costs = runner.engine.layers, Costs.of(profile)
        if builder is None:
            with ending():
                solution = solve(
                    layers,
                    costs,
                    tokens=tokens,
                    memory_limit=memory.limit,
                    memory_slack=memory.slack,
                )
            builder = solution.builder()
        return simulate(layers, builder, costs, micro_batches=len(pieces), tokens=tokens).seconds

    def slowest(seconds: float) -> float:
        return float(largest(torch.tensor([seconds], dtype=torch.float64), world))

    def option_taken(name: str) -> float | None:
        """Seconds with it; None on all ranks where it cannot be measured or has no plan."""
        runner.agreed.travel(name, narrow=True)
        try:
            other = together(take, world)
            seconds = slowest(together(lambda: step(other), world))
        except (RuntimeError, ValueError):
            seconds = None
        runner.agreed.travel(name, narrow=False)
        return seconds

    made: list[Offer] = []
    own = found.predicted[_SEARCHED]
    for name in runner.agreed.narrower:
        option = NARROWER[name]
        if not option.is_worth_asking(slowest(own.exposed.get(option.lane, 0.0) / own.seconds)):
            continue
        seconds = option_taken(name)
        if seconds is not None:
            before = slowest(together(lambda: step(profile, found.solution.builder()), world))
            changes = option.changes(runner.agreed.fp8)
            made.append(Offer(f"{name}=True", seconds, before, changes, _MEASURED))
    return made
