"""How many micro-batches have a layer's activations saved, whenever two layers meet."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from lightning_dhellam.pipeline.schedules import Part
from lightning_dhellam.pipeline.stage import Leg


class Moment(NamedTuple):
    """Two layers beside each other.

    Attributes:
        ahead: number of the layer that goes forward, or None.
        behind: number of the layer that goes backward, or None.
        saved: for each layer how many micro-batches have been forward and not yet backward through
            it, those that are here counted.
    """

    ahead: int | None
    behind: int | None
    saved: tuple[int, ...]


def moments(legs: Iterable[Leg], layers: int) -> dict[Moment, int]:
    """Return how often each moment occurs in a step.

    Where backward is in two parts, the first is taken for all of it, and what is saved of a layer
    to stay until the second.

    Args:
        legs: walks of a stage.
        layers: how many layers the stage has.
    """
    found: dict[Moment, int] = {}
    saved = [0] * layers
    for leg in legs:
        for ahead, behind in leg.pairs:
            if ahead is not None:
                saved[ahead] += 1
            meets = None if leg.part is Part.WEIGHT else behind
            if ahead is not None or meets is not None:
                moment = Moment(ahead, meets, tuple(saved))
                found[moment] = found.get(moment, 0) + 1
            if behind is not None and leg.part is not Part.INPUT:
                saved[behind] -= 1
    return found
