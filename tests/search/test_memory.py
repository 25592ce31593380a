"""The predicted peak of memory is what the engine's lanes need, on streams that keep the books."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dhellam.engine import Engine, MicroBatch
from lightning_dhellam.engine.lanes import CudaLanes, Lanes
from lightning_dhellam.plan import BUILDERS, Builder, Graph, GraphPair, Operator
from lightning_dhellam.search.walk import Walk, step_stops
from tests.plan.graphs import random_builder
from tests.search.graphs import costs, graphs_of, model
from tests.streams import Streams

TOKENS, MICRO_BATCHES = 8, 4
PLANS: dict[str, Builder] = BUILDERS | {f"random-{s}": random_builder(s) for s in range(20)}


class Meter:
    """Bytes of the tensors that operators have made and somebody still holds."""

    def __init__(self) -> None:
        self.bytes = self.peak = 0

    def make(self, size: int) -> Tensor:
        made = torch.empty(size, dtype=torch.uint8)
        weakref.finalize(made, self._freed, size)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
        return made

    def _freed(self, size: int) -> None:
        self.bytes -= size


def _running(graph: Graph, meter: Meter) -> Graph:
    """The graph with operators that allocate what they write, and do nothing else."""

    def run(operator: Operator) -> Callable[..., Any]:
        sizes = [round(graph.bytes_per_token.get(s, 0.0) * TOKENS) for s in operator.writes]

        def launch(*values: Any) -> Any:
            if "loss" in operator.writes:
                return torch.zeros(()), meter.make(sizes[1])
            made = tuple(meter.make(size) for size in sizes)
            return made if len(made) > 1 else (*made, None)[0]

        return launch

    return replace(graph, operators=tuple(replace(o, run=run(o)) for o in graph.operators))


def _layers(meter: Meter) -> list[GraphPair]:
    pairs = model(2)
    for pair in pairs:
        for graph in (pair.forward, pair.backward):
            if "loss" in graph.bytes_per_token:
                graph.bytes_per_token["loss"] = 0.0  # type: ignore[index]
    return [GraphPair(_running(p.forward, meter), _running(p.backward, meter)) for p in pairs]


def _measured(builder: Builder, lanes: Lanes, meter: Meter, layers: list[GraphPair]) -> int:
    engine = Engine(layers, lanes, builder)
    names = ("tokens", "labels", "weights")
    unread = {f"batch.{name}": torch.zeros(1, TOKENS, dtype=torch.long) for name in names}
    piece = MicroBatch({**unread, "batch.key": None}, TOKENS)
    engine.train([piece] * MICRO_BATCHES)
    assert not meter.bytes, "memory is held beyond the step"
    return meter.peak


def _predicted(builder: Builder, layers: list[GraphPair], inline: bool) -> float:
    given = replace(costs(graphs_of(layers), 110e9), inline=inline)
    stops = step_stops(layers, MICRO_BATCHES)
    walk = Walk(stops, given)
    return walk.peak_bytes(walk.order([builder(*stop.graphs) for stop in stops]), TOKENS)


@pytest.mark.parametrize("plan", PLANS)
def test_memory_that_waits_for_its_lane_is_counted(
    plan: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Streams().install(monkeypatch)
    meter = Meter()
    layers = _layers(meter)
    measured = _measured(PLANS[plan], CudaLanes(torch.device("cuda")), meter, layers)
    assert _predicted(PLANS[plan], layers, inline=False) == pytest.approx(measured, rel=1e-6)
    assert _predicted(PLANS[plan], layers, inline=True) <= measured


def test_memory_that_waits_matters() -> None:
    layers = _layers(Meter())
    waiting, free = (
        _predicted(BUILDERS["interleaved"], layers, inline) for inline in (False, True)
    )
    assert waiting > 1.05 * free
