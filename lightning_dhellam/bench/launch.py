"""`dhellam bench launch`: what the engine adds on the host to launching an operator.

The step is walked with operators that return ready-made values instead of launching anything, so
all that is left is the engine: tapes, lanes, the ledger, the program.
"""

from __future__ import annotations

import time
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace

from lightning_dhellam.bench.report import Report, device_name, pick_device
from lightning_dhellam.engine import Engine, cut, make_lanes
from lightning_dhellam.layers import lower
from lightning_dhellam.models import CausalLM, preset
from lightning_dhellam.parallel import ParallelContext, Topology
from lightning_dhellam.plan import Graph, GraphPair, Operator, builder

DESCRIPTION = "host time that the engine adds to an operator's own launch"

COLUMNS = ("plan", "operators", "engine us", "launch us")
_WARM_UP = 4


def add_options(parser: ArgumentParser) -> None:
    """What to measure."""
    parser.add_argument("--plans", type=list[str], default=["sequential", "interleaved"])
    parser.add_argument("--repeats", type=int, default=10, help="steps; the median counts")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run(options: Namespace) -> Report:
    """Measure, per operator, the engine alone and the whole launch."""
    device = pick_device(options.device)
    model = CausalLM(
        preset("llama-tiny", num_layers=8), ParallelContext.single(device),
        torch.bfloat16 if device.type == "cuda" else torch.float32,
    ).to(device)  # fmt: skip
    for parameter in model.parameters():
        grad = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.main_grad = grad  # type: ignore[attr-defined]
    layers = lower(model).layers
    count = 4 * sum(len(p.forward.operators) + len(p.backward.operators) for p in layers)
    report = Report("launch", device_name(device), COLUMNS)
    hollow = _Hollow()
    empty = [hollow.pair(pair) for pair in layers]
    engines = {
        (plan, kind): Engine(graphs, make_lanes(device), builder(plan))
        for plan in options.plans
        for kind, graphs in (("whole", layers), ("alone", empty))
    }
    times: dict[tuple[str, str], list[float]] = {key: [] for key in engines}
    for step in range(_WARM_UP + options.repeats):
        # In turn: a host that was idle needs some steps to reach its clock.
        for key, engine in engines.items():
            times[key].append(_host_seconds(engine, device, step))
    for plan in options.plans:
        whole, alone = (median(times[plan, kind][_WARM_UP:]) for kind in ("whole", "alone"))
        row = (plan, count, alone / count * 1e6, whole / count * 1e6)
        report.rows.append(dict(zip(COLUMNS, row, strict=True)))
    return report


def _host_seconds(engine: Engine, device: torch.device, step: int) -> float:
    """Host time of a step of four micro-batches, too small to wait for."""
    tokens = torch.randint(0, 4096, (4, 65), device=device)
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
