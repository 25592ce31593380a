"""What a traced step shows."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from lightning_dhellam.layers import lower
from lightning_dhellam.models import ModelConfig
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.plan import Lane
from tests.engine.harness import CPU, batch_of, differing, engine_of, pieces, prepared, train
from tests.ranks import run_ranks

CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=32,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=32,
    max_sequence_length=16,
)
MICRO_BATCHES = 3


def traced_step(rank: int, tensor_parallel_size: int) -> list[str]:
    """Trace a step, check what it shows, and that it changes nothing."""
    context = ParallelContext.create(CPU, tensor_parallel_size=tensor_parallel_size)
    model = prepared(CONFIG, context)
    engine = engine_of(lower(model))
    batch = pieces(batch_of(CONFIG), 1, context)
    expected = train(engine, model, batch)
    with engine.traced(CPU) as tracer:
        actual = train(engine, model, batch)
    train(engine, model, batch)
    spans = tracer.spans()
    graphs = [
        (index, graph)
        for index, pair in enumerate(engine.layers)
        for graph in (pair.forward, pair.backward)
    ]
    found = Counter((s.layer, s.strand, s.operator.name, s.micro_batch) for s in spans)
    assert found == Counter(
        (index, graph.direction, operator.name, number)
        for index, graph in graphs
        for operator in graph.operators
        for number in range(MICRO_BATCHES)
    ), "not every operator once for each micro-batch of the one traced step"
    times = {(s.layer, s.strand, s.operator.name, s.micro_batch): (s.start, s.end) for s in spans}
    assert all(0 <= start <= end for start, end in times.values())
    for index, graph in graphs:
        for name, before in graph.predecessors.items():
            for number in range(MICRO_BATCHES):
                start = times[index, graph.direction, name, number][0]
                for other in before:
                    # A thread notes the end of communication, a little after it.
                    if graph.by_name[other].lane is Lane.COMPUTE:
                        assert times[index, graph.direction, other, number][1] <= start
    lanes = {span.operator.lane for span in spans}
    assert lanes == ({Lane.COMPUTE, Lane.TP} if tensor_parallel_size > 1 else {Lane.COMPUTE})
    return differing(actual, expected)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_traced_step_shows_every_operator_and_changes_nothing(ranks: int) -> None:
    assert run_ranks(ranks, traced_step, ranks) == [[]] * ranks


def test_an_untraced_step_follows() -> None:
    model = prepared(CONFIG, ParallelContext.single(CPU))
    engine = engine_of(lower(model))
    batch = pieces(batch_of(CONFIG), 1, ParallelContext.single(CPU))
    with pytest.raises(ZeroDivisionError), engine.traced(torch.device("cpu")) as tracer:
        raise ZeroDivisionError
    train(engine, model, batch)
    assert tracer.spans() == []
