"""How many micro-batches have a layer's activations saved, whenever two layers meet."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


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


def moments(
    walks: Iterable[Iterable[tuple[int | None, int | None]]], layers: int
) -> dict[Moment, int]:
    """Return how often each moment occurs in a step.

    Args:
        walks: of a stage, each the pairs of layers that go beside each other: one forward, one
            backward.
        layers: how many layers the stage has.
    """
    found: dict[Moment, int] = {}
    saved = [0] * layers
    for ahead, behind in (pair for walk in walks for pair in walk):
        if ahead is not None:
            saved[ahead] += 1
        moment = Moment(ahead, behind, tuple(saved))
        found[moment] = found.get(moment, 0) + 1
        if behind is not None:
            saved[behind] -= 1
    return found
