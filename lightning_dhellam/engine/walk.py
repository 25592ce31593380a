"""The micro-batches of one step on their way through the layers of a stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_dhellam.engine.batch import MicroBatch
from lightning_dhellam.engine.lanes import Lanes
from lightning_dhellam.engine.tape import Slot, Tape
from lightning_dhellam.plan import Graph


@dataclass
class Walk:
    """One micro-batch's way through the layers, forward and then backward.

    Attributes:
        batch: the tape of the micro-batch itself.
        tapes: of each layer that it has entered, or whose inputs are on their way.
        carried: slots that the last graph handed over.
    """

    batch: Tape
    tapes: dict[int, Tape] = field(default_factory=dict)
    carried: list[Slot] = field(default_factory=list)


class Walks:
    """State of a step: the walks of the micro-batches that are under way.

    Args:
        pieces: the micro-batches.
        lanes: of this rank's device.
        readers: how many readers each slot of a layer has.
    """

    def __init__(
        self,
        pieces: Sequence[MicroBatch],
        lanes: Lanes,
        readers: Callable[[int], Counter[str]],
    ) -> None:
        self._pieces = pieces
        self._lanes = lanes
        self._readers = readers
        self._walks: dict[int, Walk] = {}

    @property
    def count(self) -> int:
        """How many micro-batches the step has."""
        return len(self._pieces)

    def walk(self, micro_batch: int) -> Walk:
        """The walk of a micro-batch, begun on first use."""
        if micro_batch not in self._walks:
            slots = self._pieces[micro_batch].slots
            batch = Tape(Counter(dict.fromkeys(slots, 1)))
            for name, slot in self._lanes.constants(slots).items():
                batch.put(name, slot)
            self._walks[micro_batch] = Walk(batch)
        return self._walks[micro_batch]

    def tape(self, micro_batch: int, layer: int) -> Tape:
        """The tape of a micro-batch in a layer, opened on first use."""
        walk = self.walk(micro_batch)
        if layer not in walk.tapes:
            walk.tapes[layer] = Tape(self._readers(layer), walk.batch)
        return walk.tapes[layer]

    def enter(self, micro_batch: int, layer: int, graph: Graph) -> Tape:
        """Put what the strand's last graph handed over on the tape of its next one."""
        walk, tape = self.walk(micro_batch), self.tape(micro_batch, layer)
        for name, slot in zip(graph.taken, walk.carried, strict=True):
            if not tape.put(name, slot) and not slot.holders:
                self._lanes.release(slot)
        walk.carried = []
        return tape

    def leave(self, micro_batch: int, layer: int, graph: Graph) -> None:
        """Take what the graph hands over."""
        walk = self.walk(micro_batch)
        walk.carried = walk.tapes[layer].take(graph.handed)

    def results(self, micro_batch: int) -> list[Tensor]:
        """What the last graph of a leg has handed over: the loss, and elsewhere nothing."""
        walk = self.walk(micro_batch)
        values = [self._lanes.hand_out(slot) for slot in walk.carried]
        walk.carried = []
        return values

    def close(self, micro_batch: int, layer: int) -> None:
        """Forget a layer that no backward strand will visit."""
        del self.walk(micro_batch).tapes[layer]

    def end(self, micro_batch: int) -> None:
        """Forget a micro-batch, of which nothing may be left."""
        walk = self._walks.pop(micro_batch)
        left: dict[int, Any] = {i: t.names() for i, t in walk.tapes.items() if t.names()}
        assert not left, f"slots outlive their micro-batch: {left}"
