"""Values that the host must know: a copy, and a wait that is a row of the plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dhellam.engine import Engine, Lanes, MicroBatch, make_lanes
from lightning_dhellam.engine.executor import bind
from lightning_dhellam.parallel.collectives import Pending
from lightning_dhellam.plan import BUILDERS, Graph, GraphPair, Issue, PlanError
from lightning_dhellam.plan.operator import Operator
from tests.engine.harness import CPU
from tests.plan.graphs import graph, random_builder

FORWARD = """
count compute: x -> count
count.gather ep: count -> counts
copy host: counts -> host_counts
beside compute: x -> other
look host: host_counts -> sizes
take compute: other sizes -> y
"""
BACKWARD = """
give compute: dy sizes -> dx
"""


class LateWork:
    """A collective whose result is wrong until somebody has waited."""

    def __init__(self, out: Tensor, value: Tensor) -> None:
        self._out, self._value = out, value

    def wait(self) -> None:
        self._out.copy_(self._value)

    def is_completed(self) -> bool:
        return False


def _gather(count: Tensor) -> Pending:
    out = torch.zeros(2, dtype=torch.int64)
    return Pending(out, LateWork(out, torch.cat([count, 2 * count])))


RUNS: dict[str, Any] = {
    "count": lambda x: (x > 0).sum()[None],
    "count.gather": _gather,
    "copy": Tensor.clone,
    "beside": lambda x: x + 1,
    "look": lambda counts: tuple(counts.tolist()),
    "take": lambda other, sizes: other * sizes[1],
    "give": lambda dy, sizes: dy * sizes[1],
}


def _running(drawn: Graph) -> Graph:
    def with_run(operator: Operator) -> Operator:
        return replace(operator, run=RUNS[operator.name], waits=operator.name == "look")

    return replace(drawn, operators=tuple(map(with_run, drawn.operators)))


def _layer() -> GraphPair:
    forward = graph("forward", FORWARD, "x", "y")
    return GraphPair(_running(forward), _running(graph("backward", BACKWARD, "dy", "dx")))


def _ends() -> tuple[GraphPair, GraphPair]:
    def add(name: str, direction: str, text: str, ends: tuple[str, str], run: Any) -> Graph:
        drawn = graph(direction, text, *ends, name=name)
        return replace(drawn, operators=tuple(replace(o, run=run) for o in drawn.operators))

    first = GraphPair(
        add("source", "forward", "read compute: batch.tokens -> y", ("", "y"), Tensor.float),
        add("source", "backward", "keep compute: dy batch.found ->", ("dy", ""), _keep),
    )
    last = GraphPair(
        add("loss", "forward", "sum compute: x -> loss", ("x", "loss"), Tensor.sum),
        add("loss", "backward", "grad compute: x -> dx", ("", "dx"), torch.ones_like),
    )
    return first, last


def _keep(dy: Tensor, found: list[Tensor]) -> None:
    found.append(dy.clone())


@pytest.mark.parametrize("poison", [False, True])
def test_every_plan_waits_for_what_the_host_looks_at(poison: bool) -> None:
    source, loss = _ends()
    layers = (source, _layer(), _layer(), loss)
    for name, builder in (BUILDERS | {f"random-{s}": random_builder(s) for s in range(20)}).items():
        lanes: Lanes = make_lanes(CPU, poison=poison)
        found: list[Tensor] = []
        tokens = [torch.tensor([1, 2, -3, 4]), torch.tensor([5, -6, -7, -8])]
        pieces = [MicroBatch({"batch.tokens": t, "batch.found": found}, 4) for t in tokens]
        total = Engine(layers, lanes, builder).train(pieces)
        expected = [_loss(t) for t in tokens]
        assert float(total) == sum(value for value, _ in expected), name
        assert [float(dy[0]) for dy in found] == [factor for _, factor in expected], name
        assert (lanes.ledger.slots, lanes.ledger.bytes) == (0, 0)


def _loss(tokens: Tensor) -> tuple[float, float]:
    x, factor = tokens.float(), 1.0
    for _ in range(2):
        size = 2 * int((x > 0).sum())
        x, factor = (x + 1) * size, factor * size
    return float(x.sum()), factor


def test_what_the_host_looks_at_is_marked_on_its_own_lane_as_well() -> None:
    pair = _layer()
    program = bind(
        BUILDERS["interleaved"](pair.forward, None), pair.forward, None, follows=pair.backward
    )
    entries = {e.operator.name: e for e in program.entries if e is not None}
    assert entries["copy"].crosses and entries["look"].crosses
    assert entries["count.gather"].crosses and not entries["beside"].crosses


def test_the_host_hides_nothing_but_is_no_communication() -> None:
    pair = _layer()
    plan = BUILDERS["sequential"](pair.forward, None)
    kinds = [row.operator if isinstance(row, Issue) else "-" for row in plan.rows]
    assert kinds == ["count", "count.gather", "-", "copy", "beside", "look", "take"]
    rows = tuple(
        replace(row, first=isinstance(row, Issue) and row.operator == "copy")
        if isinstance(row, Issue)
        else row
        for row in plan.rows
    )
    with pytest.raises(PlanError, match="only communication can go first"):
        bind(replace(plan, rows=rows), pair.forward, None)


def test_the_wait_comes_as_late_as_compute_has_work() -> None:
    """In built-in plans the device has been given what can run before the host waits."""
    pair = _layer()
    for name in ("megatron", "dhellam", "interleaved"):
        order = [row.operator for row in BUILDERS[name](pair.forward, None).issues]
        assert order.index("beside") < order.index("look"), name
