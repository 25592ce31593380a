"""What is looked at while a step runs, to tell what was not finite first."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from lightning_dhellam.engine.anomalies import Watch
from lightning_dhellam.layers import lower
from lightning_dhellam.parallel import ParallelContext
from tests.engine.harness import CPU, batch_of, engine_of, pieces, prepared, train
from tests.engine.test_trace import CONFIG, MICRO_BATCHES


@pytest.mark.parametrize("traced_first", [True, False])
def test_a_step_is_watched_and_traced_at_once(traced_first: bool) -> None:
    context = ParallelContext.single(CPU)
    model = prepared(CONFIG, context)
    engine = engine_of(lower(model))
    names = [f"place {number}" for number in range(len(engine.layers))]
    watch = Watch(engine.layers, names, {p: name for name, p in model.named_parameters()})
    (weight,) = (p for name, p in model.named_parameters() if "1.mlp.linear_fc1.weight" in name)
    with torch.no_grad():
        weight[0, 0] = torch.nan
    with ExitStack() as stack:
        if traced_first:
            tracer = stack.enter_context(engine.traced(CPU))
        stack.enter_context(engine.wrapped(watch.watched))
        if not traced_first:
            tracer = stack.enter_context(engine.traced(CPU))
        train(engine, model, pieces(batch_of(CONFIG), 1, context))
    found = watch.first()
    assert found is not None
    assert (found.operator, found.micro_batch) == ("forward/fc1.gemm", 0)
    assert found.layer == "place 2", "after the embedding and the first layer"
    graphs = [graph for pair in engine.layers for graph in (pair.forward, pair.backward)]
    assert len(tracer.spans()) == MICRO_BATCHES * sum(len(graph.operators) for graph in graphs)
