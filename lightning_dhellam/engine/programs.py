"""Programs of a stage's layers: what the plans in use make of their graphs, each made once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lightning_dhellam.engine.executor import Program, bind
from lightning_dhellam.pipeline.schedules import Part
from lightning_dhellam.plan import Builder, Graph, GraphPair, Plan, passes


class Programs:
    """Makes the program of each pair of graphs when it is first run.

    Args:
        layers: graphs of every layer of a rank, first to last.
        builder: makes the plan of each pair of graphs.

    Attributes:
        layers: as they were given, until they are made to suit another length.
        builder: in use.
    """

    def __init__(self, layers: Sequence[GraphPair], builder: Builder) -> None:
        self.layers = tuple(layers)
        self.builder = builder
        self._plans: dict[tuple[str, str], Plan] = {}
        self._programs: dict[tuple[int | None, int | None, Part], Program] = {}
        self._evaluations: dict[int, Program] = {}
        self._halves: dict[int, tuple[Graph, Graph]] = {}

    def install(self, builder: Builder) -> None:
        """Use the plans of `builder` from now on."""
        self.builder = builder
        self._plans.clear()
        self._programs.clear()
        self._evaluations.clear()

    def suit(self, length: int) -> None:
        """Make plans from the nominal costs of sequences of `length` tokens from now on."""
        self.layers = tuple(pair.at(length) for pair in self.layers)
        self._halves.clear()
        self.install(self.builder)

    def plans(self) -> list[Plan]:
        """The plans that were made, in the order in which they were."""
        return list(dict.fromkeys(self._plans.values()))

    def readers(self, layer: int) -> Counter[str]:
        """How many readers each slot of a layer has, over both directions."""
        pair = self.layers[layer]
        return pair.forward.readers + pair.backward.readers

    def backward(self, layer: int, part: Part) -> Graph:
        """The backward graph of a layer, or one of its halves."""
        graph = self.layers[layer].backward
        if part is Part.BACKWARD:
            return graph
        if layer not in self._halves:
            self._halves[layer] = passes.halves(graph)
        return self._halves[layer][part is Part.WEIGHT]

    def of_pair(self, forward: int | None, backward: int | None, part: Part) -> Program | None:
        """The program of layer `forward` beside `part` of layer `backward`, made on first use.

        None where there is nothing to do.
        """
        key = (forward, backward, part)
        if key not in self._programs:
            ahead = self.layers[forward] if forward is not None else None
            behind = self.backward(backward, part) if backward is not None else None
            if behind is not None and not behind.operators:
                behind = None
            if ahead is None and behind is None:
                return None
            rest = None
            if backward is not None and part is Part.INPUT:
                rest = self.backward(backward, Part.WEIGHT)
            graph, follows = (ahead.forward, ahead.backward) if ahead else (None, None)
            self._programs[key] = bind(self._plan(graph, behind), graph, behind, follows, rest)
        return self._programs[key]

    def of_one(self, graph: Graph) -> Program:
        """The program of one graph that no backward follows."""
        if id(graph) not in self._evaluations:
            self._evaluations[id(graph)] = bind(self._plan(graph, None), graph, None)
        return self._evaluations[id(graph)]

    def _plan(self, forward: Graph | None, backward: Graph | None) -> Plan:
        key = (forward.fingerprint if forward else "", backward.fingerprint if backward else "")
        if key not in self._plans:
            self._plans[key] = self.builder(forward, backward)
        return self._plans[key]
