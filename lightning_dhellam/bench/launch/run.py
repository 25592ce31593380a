"""Times the host in steps whose operators launch, and in steps whose operators do nothing."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from lightning_dhellam.bench.launch.report import COLUMNS, row_of
from lightning_dhellam.bench.launch.settings import Settings
from lightning_dhellam.bench.report import Report, device_name, pick_device
from lightning_dhellam.bench.workload import give_gradients
from lightning_dhellam.engine import Engine, cut, make_lanes
from lightning_dhellam.layers import lower
from lightning_dhellam.models import CausalLM, preset
from lightning_dhellam.parallel import ParallelContext, Topology
from lightning_dhellam.plan import Graph, GraphPair, Operator, builder

_WARM_UP = 4
_MICRO_BATCHES = 4
_LENGTH = 64


def measure(settings: Settings, folder: Path) -> Report:
    """Measure the engine alone and the whole launch, per operator."""
    device = pick_device(settings.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = preset("llama-tiny", num_layers=8)
    model = CausalLM(config, ParallelContext.single(device), dtype).to(device)
    give_gradients(model)
    layers = [pair.at(_LENGTH) for pair in lower(model).layers]
    each = sum(len(p.forward.operators) + len(p.backward.operators) for p in layers)
    hollow = _Hollow()
    empty = [hollow.pair(pair) for pair in layers]
    engines = {
        (plan, kind): Engine(graphs, make_lanes(device), builder(plan))
        for plan in settings.plans
        for kind, graphs in (("whole", layers), ("alone", empty))
    }
    times: dict[tuple[str, str], list[float]] = {key: [] for key in engines}
    for step in range(_WARM_UP + settings.repeats):
        # In turn: a host that was idle needs some steps to reach its full speed.
        for key, engine in engines.items():
            times[key].append(_host_seconds(engine, device, step))
    report = Report("launch", device_name(device), COLUMNS)
    for plan in settings.plans:
        alone, whole = (median(times[plan, kind][_WARM_UP:]) for kind in ("alone", "whole"))
        report.rows.append(row_of(plan, _MICRO_BATCHES * each, alone, whole))
    return report


def _host_seconds(engine: Engine, device: torch.device, step: int) -> float:
    """The host's time for a step of micro-batches that are too small to be waited for."""
    tokens = torch.randint(0, 4096, (_MICRO_BATCHES, _LENGTH + 1), device=device)
    batch = {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}
    pieces = cut(batch, 1, device=device, seed=1, step=step, topology=Topology())
    _synchronize(device)
    begin = time.perf_counter()
    engine.train(pieces)
    taken = time.perf_counter() - begin
    _synchronize(device)
    return taken


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Hollow:
    """Operators with the same slots that do nothing but run once for real, to see their results."""

    def pair(self, pair: GraphPair) -> GraphPair:
        return GraphPair(self._graph(pair.forward), self._graph(pair.backward))

    def _graph(self, graph: Graph) -> Graph:
        return replace(graph, operators=tuple(self._operator(o) for o in graph.operators))

    def _operator(self, operator: Operator) -> Operator:
        known: list[Any] = []

        def run(*inputs: Any) -> Any:
            if not known:
                known.append(operator.run(*inputs))
            return known[0]

        return replace(operator, run=run)
