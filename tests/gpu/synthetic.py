"""A step whose communication lanes are device copies that start late at random.

Its operators are elementwise, so results are exact; what can go wrong is only when they run. One
of each layer needs a number that the host has waited for. A
tensor crosses from lane to lane about every second operator, often while the lane that reads or
overwrites it sleeps: a missing wait or a memory that is used again too early shows in the numbers.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.engine import Engine, MicroBatch, make_lanes
from lightning_dhellam.engine.tracks import Lanes
from lightning_dhellam.plan import (
    BUILDERS,
    Builder,
    Graph,
    GraphPair,
    Lane,
    Operator,
    Strand,
)

_SIZE = 1 << 16
_CYCLES = 300_000
"""About 0.15 ms: several times what the host needs to issue an operator."""


def _to_host(x: Tensor) -> Tensor:
    if not x.is_cuda:
        return x.clone()
    return torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)


@dataclass
class Step:
    """Layers, their weights, and the micro-batches of one step.

    Attributes:
        device: CPU, where nothing sleeps, or a GPU.
        layers: source, `count` layers, loss.
        weights: one of each layer in between, with `main_grad`.
    """

    device: torch.device
    count: int = 5
    layers: list[GraphPair] = field(default_factory=list)
    weights: list[torch.nn.Parameter] = field(default_factory=list)
    delays: random.Random = field(default_factory=lambda: random.Random(0))

    def __post_init__(self) -> None:
        self.layers.append(self._source())
        for index in range(self.count):
            weight = torch.nn.Parameter(torch.zeros(_SIZE, device=self.device))
            weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
            self.weights.append(weight)
            self.layers.append(self._layer(weight, 0.5 + 0.1 * index))
        self.layers.append(self._loss())

    def micro_batches(self, count: int = 3) -> list[MicroBatch]:
        """Random numbers, the same on every device."""
        generator = torch.Generator().manual_seed(7)
        return [
            MicroBatch({"batch.x": torch.rand(_SIZE, generator=generator).to(self.device)}, _SIZE)
            for _ in range(count)
        ]

    def engine(self, builder: Builder, *, poison: bool = False) -> Engine:
        """An engine with lanes of its own."""
        lanes: Lanes = make_lanes(self.device, poison=poison)
        return Engine(self.layers, lanes, builder)

    def outcome(self, builder: Builder, *, poison: bool = False) -> list[Tensor]:
        """Loss and weight gradients, on the host."""
        for weight in self.weights:
            weight.main_grad.zero_()
        loss = self.engine(builder, poison=poison).train(self.micro_batches())
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return [loss.cpu(), *(weight.main_grad.cpu() for weight in self.weights)]

    def sequential(self) -> list[Tensor]:
        """The outcome with nothing overlapped."""
        return self.outcome(BUILDERS["sequential"])

    def _run(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*values: Any) -> Any:
            if self.device.type == "cuda" and self.delays.random() < 0.4:
                torch.cuda._sleep(_CYCLES)
            return function(*values)

        return run

    def _graph(
        self,
        name: str,
        direction: Strand,
        ends: tuple[str, str],
        operators: list[tuple[str, Lane, str, str, Callable[..., Any]]],
        weight: torch.nn.Parameter | None = None,
    ) -> Graph:
        return Graph(
            name,
            direction,
            tuple(
                Operator(
                    operator,
                    lane,
                    tuple(reads.split()),
                    tuple(writes.split()),
                    self._run(function),
                    cost=1.0,
                    accumulates=() if writes or weight is None else (weight,),
                    waits=operator == "look",
                )
                for operator, lane, reads, writes, function in operators
            ),
            tuple(ends[0].split()),
            tuple(ends[1].split()),
        )

    def _layer(self, weight: torch.nn.Parameter, factor: float) -> GraphPair:
        def accumulate(dy: Tensor, a: Tensor) -> None:
            weight.main_grad.add_(dy * a)  # type: ignore[attr-defined]

        forward = self._graph(
            "layer",
            Strand.FORWARD,
            ("x", "y"),
            [
                ("a", Lane.COMPUTE, "x", "a", lambda x: x * factor),
                ("gather", Lane.TP, "a", "whole", lambda a: a + 0.25),
                ("b", Lane.COMPUTE, "whole x", "b", lambda whole, x: whole * x),
                ("exchange", Lane.CP, "b", "exchanged", lambda b: b.clone()),
                ("count", Lane.COMPUTE, "a", "count", lambda a: (a > 0.3).sum()[None]),
                ("copy", Lane.HOST, "count", "host_count", _to_host),
                ("look", Lane.HOST, "host_count", "number", lambda count: int(count[0])),
                ("c", Lane.COMPUTE, "exchanged number", "c", lambda e, n: e + n / _SIZE),
                ("scatter", Lane.TP, "c a", "y", lambda c, a: c - a),
            ],
        )
        backward = self._graph(
            "layer",
            Strand.BACKWARD,
            ("dy", "dx"),
            [
                ("grad_gather", Lane.TP, "dy", "d_c", lambda dy: dy * 1.5),
                ("dgrad", Lane.COMPUTE, "d_c exchanged", "d_b", lambda d, e: d * e + d),
                ("grad_exchange", Lane.CP, "d_b", "d_whole", lambda d: d * 0.5),
                ("regather", Lane.TP, "a", "again", lambda a: a + 0.25),
                ("wgrad", Lane.COMPUTE, "d_c again", "", accumulate),
                ("norm.grad", Lane.COMPUTE, "d_whole x dy", "dx", lambda d, x, r: d * x + r),
            ],
            weight,
        )
        return GraphPair(forward, backward)

    def _source(self) -> GraphPair:
        forward = self._graph(
            "source",
            Strand.FORWARD,
            ("", "y"),
            [("read", Lane.TP, "batch.x", "y", lambda x: x + 0.5)],
        )
        backward = self._graph(
            "source",
            Strand.BACKWARD,
            ("dy", ""),
            [("drop", Lane.COMPUTE, "dy batch.x", "", lambda dy, x: None)],
        )
        return GraphPair(forward, backward)

    def _loss(self) -> GraphPair:
        forward = self._graph(
            "loss",
            Strand.FORWARD,
            ("x", "loss"),
            [
                ("gather", Lane.TP, "x", "whole", lambda x: x * 2),
                ("sum", Lane.COMPUTE, "whole", "loss", lambda whole: whole.sum()),
            ],
        )
        backward = self._graph(
            "loss",
            Strand.BACKWARD,
            ("", "dx"),
            [
                ("grad", Lane.COMPUTE, "x", "d_x", lambda x: x * 0.5 + 1),
                ("scatter", Lane.CP, "d_x", "dx", lambda d: d.clone()),
            ],
        )
        return GraphPair(forward, backward)
