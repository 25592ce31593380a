"""Stops of a walk: which layer goes forward beside which one that goes backward, and when."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lightning_dhellam.plan import Graph, GraphPair, Strand


@dataclass(frozen=True, slots=True)
class Place:
    """A micro-batch in a layer, which has the graphs of both directions."""

    micro_batch: int
    layer: int
    graphs: GraphPair


@dataclass(frozen=True, slots=True)
class Stop:
    """A pair of layers: forward of one micro-batch beside backward of another."""

    forward: Place | None
    backward: Place | None

    @property
    def strands(self) -> Iterator[tuple[Strand, Place, Graph]]:
        """Give each strand that is here, with its place and its graph."""
        if self.forward is not None:
            yield Strand.FORWARD, self.forward, self.forward.graphs.forward
        if self.backward is not None:
            yield Strand.BACKWARD, self.backward, self.backward.graphs.backward

    @property
    def pairs(self) -> tuple[GraphPair | None, GraphPair | None]:
        """Return the layer that goes forward and the one that goes backward, None if absent."""
        return (
            self.forward.graphs if self.forward else None,
            self.backward.graphs if self.backward else None,
        )

    @property
    def graphs(self) -> tuple[Graph | None, Graph | None]:
        """Return the forward graph and the backward one, None if absent."""
        ahead, behind = self.pairs
        return (ahead.forward if ahead else None, behind.backward if behind else None)

    def leads_to(self, other: Stop) -> bool:
        """Tell whether `other` carries on with the same micro-batches."""
        here, there = (
            [(strand, place.micro_batch) for strand, place, _ in stop.strands]
            for stop in (self, other)
        )
        return here == there


def step_stops(layers: Sequence[GraphPair], micro_batches: int) -> list[Stop]:
    """Make the stops of a training step on one stage.

    Micro-batch k goes forward from the first layer to the last beside micro-batch k - 1, which
    goes backward from the last layer to the first; the first goes forward alone, and the last
    backward alone.
    """
    last = len(layers) - 1
    return [
        Stop(
            Place(k, index, layers[index]) if k < micro_batches else None,
            Place(k - 1, last - index, layers[last - index]) if k else None,
        )
        for k in range(micro_batches + 1)
        for index in range(last + 1)
    ]


def repeated(ahead: GraphPair | None, behind: GraphPair | None, times: int) -> list[Stop]:
    """Make stops of the same pair of layers, so many times, as in the middle of a deep model."""
    return [
        Stop(
            Place(1, number, ahead) if ahead else None,
            Place(0, times - number, behind) if behind else None,
        )
        for number in range(times)
    ]


def names(ahead: GraphPair | None, behind: GraphPair | None) -> str:
    """Name a pair of layers: `transformer|head`, with `-` for a missing strand."""
    return f"{ahead.name if ahead else '-'}|{behind.name if behind else '-'}"
