"""Costs of layers that make other slots again, or have others on the host, than were measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from lightning_dhellam.plan import Graph, GraphPair, Lane, Operator
from lightning_dhellam.plan.passes import AGAIN
from lightning_dhellam.search.measure import Key
from lightning_dhellam.search.model import Costs


@dataclass(frozen=True)
class Copies:
    """What copies to and from the host take: by the longest that was measured of each way.

    Attributes:
        seconds_of_byte: of one byte for each token of a micro-batch, by lane.
    """

    seconds_of_byte: Mapping[Lane, float]

    @classmethod
    def of(cls, costs: Costs, layers: Iterable[GraphPair]) -> Copies | None:
        """Tell it from layers of which the costs are; None where nothing is copied."""
        longest: dict[Lane, tuple[float, float]] = {}
        for pair in layers:
            for graph in (pair.forward, pair.backward):
                for operator in graph.operators:
                    if operator.lane.copies and (size := copied(graph, operator)):
                        seconds = costs.seconds[costs.keys[graph.fingerprint][operator.name]]
                        found = longest.get(operator.lane, (0.0, 0.0))
                        longest[operator.lane] = max(found, (size, seconds))
        if not longest:
            return None
        return cls({lane: seconds / size for lane, (size, seconds) in longest.items()})

    def seconds(self, size: float) -> float:
        """Seconds of copies of so many bytes per token, the longer of both ways."""
        return size * max(self.seconds_of_byte.values())


def copied(graph: Graph, operator: Operator) -> float:
    """Return the bytes per token that a copy moves: to the host it writes what counts as none."""
    slots = operator.reads if operator.lane is Lane.OFFLOAD else operator.writes
    return sum(graph.bytes_per_token.get(slot, 0.0) for slot in slots)


def of_forward(costs: Costs, measured: GraphPair, operator: Operator) -> float:
    """Return the seconds of an operator of forward, or of a part of one.

    A part is not measured, and takes its nominal share of the whole.
    """
    own = costs.keys[measured.forward.fingerprint]
    if operator.name in own:
        return costs.seconds[own[operator.name]]
    whole = next(o for o in measured.forward.operators if operator in o.remakes)
    share = operator.cost / whole.cost if whole.cost else 1.0
    return costs.seconds[own[whole.name]] * share


def covering(costs: Costs, layers: Iterable[tuple[GraphPair, GraphPair]]) -> Costs:
    """Return the costs with those of further layers, without other measurements' samples.

    Args:
        costs: of layers that were measured.
        layers: a layer that was measured, and the same one with other slots made again or copied.
    """
    layers = list(layers)
    found = _Covering(costs, Copies.of(costs, (measured for measured, _ in layers)))
    for measured, other in layers:
        for graph in (other.forward, other.backward):
            found.cover(measured, graph)
    return replace(
        costs,
        keys=found.keys,
        seconds=found.seconds,
        compute=frozenset(found.compute),
        samples=(),
    )


class _Covering:
    """Finds the keys of operators in those that were measured, and times of those that were not."""

    def __init__(self, costs: Costs, copies: Copies | None) -> None:
        self.keys, self.seconds = dict(costs.keys), dict(costs.seconds)
        self.compute = set(costs.compute)
        self._costs, self._copies = costs, copies

    def cover(self, measured: GraphPair, graph: Graph) -> None:
        """Note the operators of a graph like one of those of a layer that was measured."""
        if graph.fingerprint not in self.keys:
            self.keys[graph.fingerprint] = {
                operator.name: self._key(measured, graph, operator) for operator in graph.operators
            }

    def _key(self, measured: GraphPair, graph: Graph, operator: Operator) -> Key:
        ahead = self._costs.keys[measured.forward.fingerprint]
        own = ahead
        if graph.direction == measured.backward.direction:
            own = self._costs.keys[measured.backward.fingerprint]
        if operator.name in own:
            return own[operator.name]
        name = operator.name.removesuffix(AGAIN)
        if name in ahead:
            return ahead[name]
        key = f"{measured.name}/{operator.name}"
        if operator.lane.copies:
            assert self._copies is not None, "no copy was measured"
            each = self._copies.seconds_of_byte[operator.lane]
            self.seconds[key] = each * copied(graph, operator)
            return key
        parts = (o for whole in measured.forward.operators for o in whole.remakes)
        part = next(o for o in parts if o.name == name)
        self.seconds[key] = of_forward(self._costs, measured, part)
        self.compute.add(key)
        return key
