"""Transfers between pipeline stages, at the ends of a chunk's first and last graphs.

    first layer   forward   x.receive | ...          backward  ... | dx.send
    last layer    forward   ... | y.send             backward  dy.receive | ...

A receive needs nothing but the shape of the micro-batch, so it can be posted at any time. A stage
that rehearses makes up what it would receive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from lightning_dhellam.layers.writer import Sizes
from lightning_dhellam.parallel import collectives
from lightning_dhellam.plan import Collective, Graph, GraphPair, Lane, Operator, nominal
from lightning_dhellam.plan.placement import Edge


def connect(layers: Sequence[GraphPair], chunk: int, sizes: Sizes) -> list[GraphPair]:
    """The layers of a chunk, with the transfers from and to the chunks on other stages."""
    stage_of = sizes.context.placement.stage_of
    here = stage_of[chunk]
    connected = list(layers)
    if chunk > 0 and stage_of[chunk - 1] != here:
        there = stage_of[chunk - 1]
        first = connected[0]
        connected[0] = GraphPair(
            _receiving(first.forward, there, here, sizes),
            _sending(first.backward, here, there, sizes),
        )
    if chunk + 1 < len(stage_of) and stage_of[chunk + 1] != here:
        there = stage_of[chunk + 1]
        last = connected[-1]
        connected[-1] = GraphPair(
            _sending(last.forward, here, there, sizes),
            _receiving(last.backward, there, here, sizes),
        )
    return connected


def _receiving(graph: Graph, source: int, here: int, sizes: Sizes) -> Graph:
    (slot,) = graph.inputs
    edge = Edge(source, here, graph.direction)
    carrier, parts = sizes.context.edges[edge], sizes.tp
    dtype, hidden = sizes.dtype, sizes.hidden

    def empty(tokens: Tensor) -> Tensor:
        samples, length = tokens.shape
        return tokens.new_empty(length // parts, samples, hidden, dtype=dtype)

    def run(tokens: Tensor) -> collectives.Pending:
        return collectives.receive(empty(tokens), source, carrier)

    def made_up(tokens: Tensor) -> Tensor:
        return empty(tokens).normal_()

    operator = Operator(
        f"{slot}.receive",
        Lane.PP,
        ("batch.tokens",),
        (slot,),
        run,
        sizes.shard / nominal.LINK,
        edge=str(edge),
        collective=Collective.RECEIVE,
        rehearsals=(made_up,),
    )
    return replace(graph, receives=(operator,))


def _sending(graph: Graph, here: int, target: int, sizes: Sizes) -> Graph:
    (slot,) = graph.outputs
    edge = Edge(here, target, graph.direction)
    carrier = sizes.context.edges[edge]

    def run(x: Tensor) -> collectives.Pending:
        return collectives.send(x, target, carrier)

    def unsent(x: Tensor) -> None:
        x.contiguous()  # which a kernel does

    operator = Operator(
        f"{slot}.send",
        Lane.PP,
        (slot,),
        (),
        run,
        sizes.shard / nominal.LINK,
        edge=str(edge),
        collective=Collective.SEND,
        rehearsals=(unsent,),
    )
    return replace(graph, sends=(operator,))
