"""The state of one step: the micro-batches on their way through the layers of a stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lightning_dhellam.engine.batch import MicroBatch
from lightning_dhellam.engine.tape import Slot, Tape
from lightning_dhellam.engine.tracks import Lanes
from lightning_dhellam.plan import Graph


@dataclass
class MicroBatchState:
    """What a step knows of one micro-batch, on its way forward and then backward.

    Attributes:
        batch: the tape of the micro-batch itself.
        tapes: of each layer that it has entered, or whose inputs are on their way.
        carried: slots that the last graph handed over.
    """

    batch: Tape
    tapes: dict[int, Tape] = field(default_factory=dict)
    carried: list[Slot] = field(default_factory=list)


class StepState:
    """What a step knows of the micro-batches that are under way.

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
        self._under_way: dict[int, MicroBatchState] = {}
        self._prepared: dict[int, dict[str, Slot]] = {}

    def prepare(self, layer: int, slots: dict[str, Slot]) -> None:
        """Keep what all micro-batches read in a layer, until the step is over."""
        self._prepared.setdefault(layer, {}).update(slots)

    def finish(self) -> None:
        """Let go of that."""
        for slots in self._prepared.values():
            for slot in slots.values():
                self._lanes.release(slot)
        self._prepared.clear()

    @property
    def count(self) -> int:
        """How many micro-batches the step has."""
        return len(self._pieces)

    def of(self, micro_batch: int) -> MicroBatchState:
        """The state of a micro-batch, made on first use."""
        if micro_batch not in self._under_way:
            slots = self._pieces[micro_batch].slots
            batch = Tape(Counter(dict.fromkeys(slots, 1)))
            for name, slot in self._lanes.constants(slots).items():
                batch.put(name, slot)
            self._under_way[micro_batch] = MicroBatchState(batch)
        return self._under_way[micro_batch]

    def tape(self, micro_batch: int, layer: int) -> Tape:
        """The tape of a micro-batch in a layer, opened on first use."""
        state = self.of(micro_batch)
        if layer not in state.tapes:
            step = self._prepared.get(layer)
            state.tapes[layer] = Tape(self._readers(layer), state.batch, step)
        return state.tapes[layer]

    def enter(self, micro_batch: int, layer: int, graph: Graph) -> Tape:
        """Put what the strand's last graph handed over on the tape of its next one.

        The second half of a backward is no link of that chain: all that it needs is on its tape.
        """
        state, tape = self.of(micro_batch), self.tape(micro_batch, layer)
        if not graph.is_link:
            return tape
        for name, slot in zip(graph.taken, state.carried, strict=True):
            if not tape.put(name, slot) and not slot.holders:
                self._lanes.release(slot)
        state.carried = []
        return tape

    def leave(self, micro_batch: int, layer: int, graph: Graph) -> None:
        """Take what the graph hands over."""
        if not graph.is_link:
            return
        state = self.of(micro_batch)
        state.carried = state.tapes[layer].take(graph.handed)

    def results(self, micro_batch: int) -> list[Tensor]:
        """What the last graph of a leg has handed over: the loss, and elsewhere nothing."""
        state = self.of(micro_batch)
        values = [self._lanes.hand_out(slot) for slot in state.carried]
        state.carried = []
        return values

    def close(self, micro_batch: int, layer: int) -> None:
        """Forget a layer that no backward strand will visit."""
        del self.of(micro_batch).tapes[layer]

    def end(self, micro_batch: int) -> None:
        """Forget a micro-batch, of which nothing may be left."""
        state = self._under_way.pop(micro_batch)
        left: dict[int, Any] = {i: t.names() for i, t in state.tapes.items() if t.names()}
        assert not left, f"slots outlive their micro-batch: {left}"
