"""What is looked at while a step runs, to tell what was not finite first."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch

from lightning_dhellam.engine.anomalies import Watch
from lightning_dhellam.layers import lower
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.plan import Lane, Operator
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("slot", "has_meaning"),
    [
        *((slot, True) for slot in ("lse", "lse_of_1", "lse_to_2", "attention_state_1")),
        *((slot, True) for slot in ("statistics", "statistics_all", "lse_again", "lse_back")),
        *((slot, False) for slot in ("d_logits", "context_to_1", "norm_rstd", "loss", "dq_1")),
    ],
)
def test_minus_infinity_is_finite_where_it_has_a_meaning(
    slot: str, has_meaning: bool, dtype: torch.dtype
) -> None:
    def first(value: float) -> Any:
        watch = Watch([], [], {})
        made = torch.tensor([0.0, value], dtype=dtype)
        operator = Operator("make", Lane.COMPUTE, (), (slot,), lambda: made, 1.0)
        watch.watched(operator, operator).run()
        return watch.first()

    assert (first(-torch.inf) is None) is has_meaning
    for value in (torch.inf, torch.nan):
        assert first(value).result == slot
    assert first(1.0) is None
