"""Which operator of a step was the first to make a value that is not finite."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_dhellam.parallel.collectives import Pending
from lightning_dhellam.parallel.work import Once
from lightning_dhellam.plan import GraphPair, Lane, Operator


class Anomaly(NamedTuple):
    """A result of one rank that is not finite, though all was that its operator has read.

    Attributes:
        operator: direction and name, `backward/fc1.dgrad`.
        layer: the name of its place in the model; empty for what belongs to no layer.
        micro_batch: index; None for what runs once a step.
        result: the slot, or the parameter to whose gradient it has added.
        received: whether it was sent by other ranks, or added up with what they sent.
        place: how many operators of the rank were issued before.
    """

    operator: str
    layer: str
    micro_batch: int | None
    result: str
    received: bool
    place: int

    def __str__(self) -> str:
        layer = f" of {self.layer}" if self.layer else ""
        piece = "" if self.micro_batch is None else f", micro-batch {self.micro_batch}"
        return f"operator {self.operator}{layer}{piece}"


class _Look(NamedTuple):
    """An operator that was issued, and whether each of its results is finite, once it is there."""

    operator: Operator
    number: int
    finite: dict[str, list[Tensor]]


class Watch:
    """Looks at every result of a step on the lane that made it. The host waits for nothing.

    Minus infinity counts as finite where it has a meaning: as the log-sum-exp of a token without
    keys, and as the maximum of a rank whose part of the vocabulary is padding. Of numbers
    of 8 bits the scale is looked at.

    Args:
        layers: whose operators will run.
        names: of their places in the model.
        parameters: the names of those whose gradients operators add to.
    """

    def __init__(
        self, layers: Sequence[GraphPair], names: Sequence[str], parameters: Mapping[Tensor, str]
    ) -> None:
        self._places: dict[int, tuple[str, str]] = {}
        for pair, name in zip(layers, names, strict=True):
            for graph in (pair.forward, pair.backward):
                for operator in (*graph.receives, *graph.operators, *graph.sends):
                    self._places[id(operator)] = f"{graph.direction}/", name
            for operator in pair.forward.preparation:
                self._places[id(operator)] = "", name
        self._parameters = parameters
        self._issued: Counter[int] = Counter()
        self._looks: list[_Look] = []

    def watched(self, operator: Operator, made: Operator) -> Operator:
        """What was `made` of an operator, whose results are looked at."""
        if operator.lane is Lane.HOST:
            return made
        return replace(made, run=self._run(operator, made.run))

    def _run(self, operator: Operator, inner: Callable[..., Any]) -> Callable[..., Any]:
        look = _Look(operator, self._issued[id(operator)], {})
        self._issued[id(operator)] += 1
        self._looks.append(look)

        def run(*values: Any) -> Any:
            result = inner(*values)
            pending = isinstance(result, Pending)
            value = result.value if pending else result

            def see() -> None:
                written = value if len(operator.writes) > 1 else (value,)
                for slot, one in zip(operator.writes, written, strict=False):
                    finite = _below_infinity if slot.startswith(_LOGARITHMS) else _finite
                    look.finite[slot] = [finite(t) for t in _tensors(one)]
                for parameter in operator.accumulates:
                    found = parameter.main_grad.isfinite().all()
                    look.finite[self._parameters[parameter]] = [found]

            if pending and result.work is not None:
                return Pending(value, Once([result.work], see))
            see()
            return result

        return run

    def first(self) -> Anomaly | None:
        """What was not finite first, in the order of issue; all that it has read was, therefore.

        Waits for the device.
        """
        for place, look in enumerate(self._looks):
            for result, finite in look.finite.items():
                if not all(map(bool, finite)):
                    return self._anomaly(look, result, place)
        return None

    def _anomaly(self, look: _Look, result: str, place: int) -> Anomaly:
        operator = look.operator
        direction, layer = self._places.get(id(operator), ("", ""))
        return Anomaly(
            f"{direction}{operator.name}",
            layer,
            look.number if direction else None,
            result,
            operator.is_communication,
            place,
        )


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a value that can be looked at, without those of 8 bits."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and value.itemsize > 1:
            yield value.detach()
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _finite(tensor: Tensor) -> Tensor:
    return tensor.isfinite().all()


def _below_infinity(tensor: Tensor) -> Tensor:
    return (tensor < torch.inf).all()  # and no NaN


_LOGARITHMS = ("lse", "attention_state", "statistics")
"""How slots begin whose numbers may be the logarithm of 0."""
