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
        part: of backward, which may be in two.
        saved: for each layer how many micro-batches have been forward and not yet backward through
            it, those that are here counted.
        left: for each layer how many have been through the first half of its backward and not yet
            through the second, those that are in the second here counted.
    """

    ahead: int | None
    behind: int | None
    part: Part
    saved: tuple[int, ...]
    left: tuple[int, ...]


def moments(legs: Iterable[Leg], layers: int) -> dict[Moment, int]:
    """Return how often each moment occurs in a step.

    Args:
        legs: walks of a stage.
        layers: how many layers the stage has.
    """
    found: dict[Moment, int] = {}
    saved, left = [0] * layers, [0] * layers
    for leg in legs:
        for ahead, behind in leg.pairs:
            if ahead is not None:
                saved[ahead] += 1
            part = Part.BACKWARD if behind is None else leg.part
            moment = Moment(ahead, behind, part, tuple(saved), tuple(left))
            found[moment] = found.get(moment, 0) + 1
            if behind is not None:
                (left if part is Part.WEIGHT else saved)[behind] -= 1
                left[behind] += part is Part.INPUT
    return found
