"""Layers of a pipeline: from a profile's graphs to a model, and from a model to chunks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from math import inf

from lightning_dhellam.pipeline import split
from lightning_dhellam.plan import Graph, GraphPair, Strand
from lightning_dhellam.plan.placement import Placement
from lightning_dhellam.search.measure import Profile
from lightning_dhellam.search.model import Costs


def layers_of(profile: Profile, layers: int) -> list[GraphPair]:
    """Return the model that a profile describes, with `layers` layers between its two ends.

    The first layer is the one whose forward takes nothing in (the embedding), and the last the
    one whose backward takes nothing in (the head); either may be missing.

    Raises:
        ValueError: the profile holds no layer that could be repeated, or several.
    """
    if layers < 1:
        raise ValueError(f"--layers {layers} must be at least 1")
    pairs = _pairs(profile.graphs)
    first = [pair for pair in pairs if not pair.forward.inputs]
    last = [pair for pair in pairs if not pair.backward.inputs]
    middle = [pair for pair in pairs if pair not in first and pair not in last]
    if len(middle) != 1:
        found = ", ".join(f"'{pair.name}'" for pair in middle) or "none"
        raise ValueError(
            "a model of one kind of repeated layer can be simulated, and the profile holds"
            f" {found}: profile a model of one kind"
        )
    return [*first, *middle * layers, *last]


def _pairs(graphs: Sequence[Graph]) -> list[GraphPair]:
    """Pair graphs of one name, which stand in the profile in the same order in both directions.

    Layers may have one forward graph and several backward ones.
    """
    found = []
    for name in dict.fromkeys(graph.name for graph in graphs):
        of_name = [graph for graph in graphs if graph.name == name]
        forward = [graph for graph in of_name if graph.direction is Strand.FORWARD]
        backward = [graph for graph in of_name if graph.direction is Strand.BACKWARD]
        if len(forward) == 1:
            forward *= len(backward)
        found += [GraphPair(a, b) for a, b in zip(forward, backward, strict=False)]
    return found


def seconds_of(layer: GraphPair, costs: Costs) -> float:
    """Return the seconds of all operators of a layer, one after the other."""
    graphs = (layer.forward, layer.backward)
    return sum(costs.alone(graph, o.name) for graph in graphs for o in graph.operators)


def cut(layers: Sequence[GraphPair], costs: Costs, chunks: int) -> list[tuple[GraphPair, ...]]:
    """Cut the layers into chunks of nearly equal time, in order.

    Raises:
        ValueError: there are fewer layers than chunks.
    """
    if len(layers) < chunks:
        raise ValueError(
            f"{chunks} chunks need as many layers, and there are {len(layers)} with the first and"
            " the last: give more (--layers) or take fewer stages (--stages)"
        )
    ends = [0, *accumulate(balanced([seconds_of(layer, costs) for layer in layers], chunks))]
    return [tuple(layers[a:b]) for a, b in pairwise(ends)]


def cut_folded(
    layers: Sequence[GraphPair], costs: Costs, stages: int
) -> list[tuple[GraphPair, ...]]:
    """Cut the layers into two chunks a stage as the trainer does: by the time of stages.

    Stage 0 has what the model begins with and what it ends with.

    Raises:
        ValueError: there are too few layers.
    """
    ends = not layers[0].forward.inputs, not layers[-1].backward.inputs
    first, last = (int(end) for end in ends)
    middle = layers[first : len(layers) - last]
    each = seconds_of(middle[0], costs)
    embedding, head = (
        seconds_of(layer, costs) / each if end else 0.0
        for layer, end in zip((layers[0], layers[-1]), ends, strict=True)
    )
    counts = list(
        split.balanced(len(middle), Placement.folded(stages), embedding=embedding, head=head)
    )
    counts[0] += first
    counts[-1] += last
    if not all(counts):
        raise ValueError(
            f"{2 * stages} chunks need as many layers, and there are {len(layers)}: give more"
            " (--layers) or take fewer stages (--stages)"
        )
    return [tuple(layers[part.start : part.stop]) for part in split.chunks(counts)]


def balanced(weights: Sequence[float], parts: int) -> list[int]:
    """Return how many of the weights each part takes, in order. No part is empty.

    The heaviest part is as light as it can be, and the others are as equal as they then can be.
    """
    heaviest, _ = _partition(weights, parts, inf, largest=True)
    _, counts = _partition(weights, parts, heaviest * (1 + 1e-9), largest=False)
    return counts


def _partition(
    weights: Sequence[float], parts: int, limit: float, largest: bool
) -> tuple[float, list[int]]:
    """Return the least largest sum, or sum of squares of sums, by dynamic programming."""
    sums = [0.0, *accumulate(weights)]
    best: list[tuple[float, list[int]]] = [(0.0, []), *[(inf, [0])] * len(weights)]
    for part in range(1, parts + 1):
        row: list[tuple[float, list[int]]] = [(inf, [])] * (len(weights) + 1)
        for end in range(part, len(weights) + 1):
            for start in range(end - 1, part - 2, -1):
                weight = sums[end] - sums[start]
                if weight > limit:
                    break
                cost, counts = best[start]
                cost = max(cost, weight) if largest else cost + weight**2
                if cost < row[end][0]:
                    row[end] = cost, [*counts, end - start]
        best = row
    return best[-1]
