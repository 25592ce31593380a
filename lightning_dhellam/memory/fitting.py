"""What layers make again or have on the host so that a stage fits into its memory.

With `recompute="auto"` a search, or nominal costs without one, choose among slots that are saved,
and with `offload="auto"` those that wait on the host as well. What a stage receives
from others and sends to them is there besides, whatever is chosen, and so are slots of the step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_dhellam.layers import Lowered
from lightning_dhellam.pipeline.schedules import Part
from lightning_dhellam.pipeline.stage import Leg, Step
from lightning_dhellam.plan import Builder, Graph, GraphPair, Strand
from lightning_dhellam.plan.offloading import Slots
from lightning_dhellam.plan.passes import Recompute

if TYPE_CHECKING:
    from lightning_dhellam.search.model import Costs
    from lightning_dhellam.search.recompute import Chosen

SHARE = 0.9
"""Of the memory, where it is not measured what else a run takes."""
KNOWN_SHARE = 0.97
"""Of the memory, where it is measured, or predicted as a whole, what a run takes."""


@dataclass(frozen=True)
class Fitted:
    """What the layers of a stage make again.

    Attributes:
        choices: by the keys of layers that may make something again.
        offloads: what of these layers waits on the host, by the same keys.
        chosen: slots of each layer, and what they take.
        room: bytes that there were for slots, without those of transfers and of the step.
    """

    choices: dict[str | int, Recompute]
    offloads: dict[str, Slots]
    chosen: Chosen
    room: float


def fit(
    whole: Sequence[GraphPair],
    kept: Lowered,
    costs: Costs,
    *,
    micro_batches: int,
    tokens: int,
    room: float,
    builder: Builder | None,
    slack: float = 0.0,
) -> Fitted:
    """Choose for `room` bytes, at the least time.

    Args:
        whole: the layers of which the costs are; if some of their slots wait on the host, that is
            chosen as well.
        kept: the same ones, which make nothing again.
        costs: of the operators of `whole`.
        micro_batches: of a step.
        tokens: of a micro-batch.
        room: bytes that slots may take at once, all of them.
        builder: makes the plans; None to search them.
        slack: bytes that a searched plan of a pair of layers may take above the sequential one.

    Raises:
        ValueError: nothing fits.
    """
    # Its compiled parts take seconds to load, which few runs need.
    from lightning_dhellam.search.recompute import choose

    step = kept.stage.step(micro_batches)
    room -= tokens * transfer_bytes(kept.layers, step) + step_bytes(kept.layers)
    found = choose(
        whole,
        kept.layers,
        step.legs,
        costs,
        limit=room,
        tokens=tokens,
        free=[bool(key) for key in kept.keys],
        builder=builder,
        slack=slack,
    )
    choices: dict[str | int, Recompute] = {
        key: sorted(slots) or "none"
        for key, slots in zip(kept.keys, found.slots, strict=True)
        if key
    }
    offloads: dict[str, Slots] = {
        key: sorted(slots) for key, slots in zip(kept.keys, found.away, strict=True) if slots
    }
    return Fitted(choices, offloads, found, room)


def fit_by_rule(
    whole: Sequence[GraphPair],
    kept: Lowered,
    builder: Builder,
    *,
    micro_batches: int,
    tokens: int,
    room: float,
) -> Fitted:
    """Choose by FLOPs and bytes of the operators; see `fit`."""
    from lightning_dhellam.search.model import Costs

    graphs = [graph for pair in whole for graph in (pair.forward, pair.backward)]
    costs = Costs.nominal(graphs, tokens)
    return fit(
        whole,
        kept,
        costs,
        micro_batches=micro_batches,
        tokens=tokens,
        room=room,
        builder=builder,
    )


def step_bytes(layers: Sequence[GraphPair]) -> int:
    """Predict what the slots of a step take, which all its micro-batches read, in bytes."""
    return sum(sum(pair.forward.step_bytes.values()) for pair in layers)


def transfer_bytes(layers: Sequence[GraphPair], step: Step) -> float:
    """Predict what transfers between stages hold at most, in bytes per token.

    While a walk is under way the stage has what this one and the next receive, since that is asked
    for a walk ahead; what the last walks have sent, as many as it may be ahead of those that take
    it; and what strands have handed to a later walk of the same stage.

    Args:
        layers: of the stage.
        step: its walks.
    """
    received = [_received(layers, leg) for leg in step.legs]
    sent = [_sent(layers, leg) for leg in step.legs]
    handed: dict[tuple[Strand, int | None], float] = {}
    most = 0.0
    for index, leg in enumerate(step.legs):
        for strand, _ in leg.begins:
            handed.pop((strand, _micro_batch(leg, strand)), None)
        under_way = sum(received[index : index + 2])
        under_way += sum(sent[max(0, index + 1 - step.ahead) : index + 1])
        most = max(most, under_way + sum(handed.values()))
        for graph in _ends(layers, leg):
            if not graph.sends and graph is not layers[-1].forward:  # whose loss is taken at once
                handed[graph.direction, _micro_batch(leg, graph.direction)] = _bytes(
                    graph, graph.outputs
                )
    return most


def _micro_batch(leg: Leg, strand: Strand) -> int | None:
    return leg.forward if strand is Strand.FORWARD else leg.backward


def _received(layers: Sequence[GraphPair], leg: Leg) -> float:
    graphs = [_graph(layers, strand, layer) for strand, layer in leg.begins if _links(leg, strand)]
    return sum(_bytes(graph, o.writes) for graph in graphs for o in graph.receives)


def _sent(layers: Sequence[GraphPair], leg: Leg) -> float:
    return sum(_bytes(graph, o.reads) for graph in _ends(layers, leg) for o in graph.sends)


def _ends(layers: Sequence[GraphPair], leg: Leg) -> list[Graph]:
    """The last graph of each strand of a walk, unless it hands on nothing."""
    last = {
        Strand.FORWARD: [ahead for ahead, _ in leg.pairs if ahead is not None],
        Strand.BACKWARD: [behind for _, behind in leg.pairs if behind is not None],
    }
    return [
        _graph(layers, strand, walked[-1])
        for strand, walked in last.items()
        if walked and _links(leg, strand)
    ]


def _links(leg: Leg, strand: Strand) -> bool:
    """Whether a strand is handed something in a walk: weights' gradients need but what is saved."""
    return strand is Strand.FORWARD or leg.part is not Part.WEIGHT


def _graph(layers: Sequence[GraphPair], strand: Strand, layer: int) -> Graph:
    pair = layers[layer]
    return pair.forward if strand is Strand.FORWARD else pair.backward


def _bytes(graph: Graph, slots: Iterable[str]) -> float:
    return sum(graph.bytes_per_token.get(slot, 0.0) for slot in slots)
