"""Collectives of a graph: of any lane, with any number of slots."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from lightning_dhellam.layers.writer import GraphWriter, Sizes
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.collectives import Pending, all_to_all, exchange
from lightning_dhellam.plan import Collective, Graph, Lane, Strand, nominal
from lightning_dhellam.plan.layout import Held, Move, Rule
from tests.ranks import run_ranks

CPU = torch.device("cpu")
HIDDEN = 6
PART = Rule({Lane.CP: Move(Held.REPLICATED, Held.PARTIAL)})


def _writer(context: ParallelContext) -> GraphWriter:
    sizes = Sizes(context, torch.float32, HIDDEN, 16)
    return GraphWriter("layer", Strand.FORWARD, sizes)


def _run(graph: Graph, **values: Tensor) -> dict[str, Tensor]:
    """What is in every slot in the end."""
    for operator in graph.operators:
        pending = operator.run(*(values[slot] for slot in operator.reads))
        if not isinstance(pending, Pending):
            pending = Pending(pending, None)
        if pending.work is not None:
            pending.work.wait()
        several = pending.value if isinstance(pending.value, tuple) else (pending.value,)
        values |= dict(zip(operator.writes, several, strict=True))
    return values


def _ring(context: ParallelContext) -> Graph:
    """Keys and values go one rank on, then queries are gathered and scattered."""
    w = _writer(context)
    rank, ranks = context.topology.cp_rank, context.topology.cp_size
    pass_on = partial(exchange, target=(rank + 1) % ranks, source=(rank - 1) % ranks)
    w.collective(
        Lane.CP,
        "keys.exchange",
        ("keys", "values"),
        {"keys_1": 24.0, "values_1": 24.0},
        pass_on,
        Collective.EXCHANGE,
        Rule({Lane.CP: Move(Held.SEQUENCE, Held.SEQUENCE)}),
        crossing=48.0,
    )
    whole = w.gather("x.gather", "x", "x_full", HIDDEN, Lane.CP)
    w.compute("x.part", (whole,), {"x_part": 24.0}, torch.clone, rule=PART)
    w.scatter("x.scatter", "x_part", "x_sum", HIDDEN, Lane.CP)
    return w.graph({"keys": 24.0, "values": 24.0, "x": 24.0}, ("keys_1", "values_1"))


def _on_a_ring(rank: int) -> dict[str, list[float]]:
    context = ParallelContext.create(CPU, context_parallel_size=3)
    graph = _ring(context)
    communication = [o for o in graph.operators if o.is_communication]
    exchanged, gathered, scattered = communication
    assert {o.lane for o in communication} == {Lane.CP}
    assert [o.collective for o in communication] == [
        Collective.EXCHANGE,
        Collective.ALL_GATHER,
        Collective.REDUCE_SCATTER,
    ]
    assert exchanged.cost == 48 / nominal.LINK
    assert gathered.cost == scattered.cost == pytest.approx(24 * 2 / 3 / nominal.LINK)
    assert graph.bytes_per_token["x_sum"] == 24 / 3 and graph.bytes_per_token["values_1"] == 24
    found = _run(
        graph,
        keys=torch.full((2, 1), 1.0 + rank),
        values=torch.full((1, 3), 10.0 + rank),
        x=torch.full((2, HIDDEN), float(rank)),
    )
    context.destroy()
    return {name: value[:, 0].tolist() for name, value in found.items()}


def test_slots_go_over_the_lane_that_is_named() -> None:
    for rank, found in enumerate(run_ranks(3, _on_a_ring)):
        before = (rank - 1) % 3
        assert found["keys_1"] == [1.0 + before] * 2 and found["values_1"] == [10.0 + before]
        assert found["x_full"] == [0, 0, 1, 1, 2, 2] and found["x_sum"] == [3 * rank] * 2


def _dealt_out(rank: int) -> tuple[list[int], list[float]]:
    context = ParallelContext.create(CPU, expert_parallel_size=2)
    w = _writer(context)
    # Rank 0 keeps a row and gives two; rank 1 gives all it has.
    given, taken = ([1, 2], [1, 1]) if rank == 0 else ([1, 0], [2, 0])
    w.collective(
        Lane.EP,
        "tokens.deal",
        ("x", "ids"),
        {"x_dealt": 24.0, "ids_dealt": 8.0},
        partial(all_to_all, given=given, taken=taken),
        Collective.ALL_TO_ALL,
        Rule({Lane.EP: Move(Held.SAMPLES, Held.EXPERTS)}),
        crossing=16.0,
    )
    graph = w.graph({"x": 24.0, "ids": 8.0}, ("x_dealt",))
    rows = sum(given)
    ids = torch.arange(rows) + 10 * rank
    found = _run(graph, x=ids[:, None] + torch.zeros(rows, HIDDEN), ids=ids)
    context.destroy()
    return found["ids_dealt"].tolist(), found["x_dealt"][:, -1].tolist()


def test_rows_are_dealt_out_to_the_ranks_of_experts() -> None:
    assert run_ranks(2, _dealt_out) == [([0, 10], [0.0, 10.0]), ([1, 2], [1.0, 2.0])]


def test_one_rank_gathers_and_scatters_nothing() -> None:
    w = _writer(ParallelContext.single(CPU))
    assert w.gather("x.gather", "x", "x_full", HIDDEN, Lane.EP) == "x"
    assert w.scatter("x.scatter", "x", "x_sum", HIDDEN, Lane.CP) == "x"
    assert not w.operators
