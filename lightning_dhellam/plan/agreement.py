"""Whether the operators of a graph agree about how slots lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from lightning_dhellam.plan.layout import COMMUNICATORS, TOKENS, Held, Kept, Layout, Move, Rule
from lightning_dhellam.plan.operator import Operator


class LayoutError(ValueError):
    """Slots do not lie as an operator, a parameter or the next graph needs them."""


def follow(
    graph: str, operators: Iterable[Operator], given: Mapping[str, Layout]
) -> dict[str, Layout]:
    """How every slot lies, if those lie as `given` that are there before the first operator.

    What is neither given nor written, such as a number of the micro-batch, lies nowhere.

    Raises:
        LayoutError: naming the operator, the slot, how it lies and what is needed.
    """
    known = dict(given)
    for operator in operators:
        steps = [_Step(graph, operator, name, known) for name in COMMUNICATORS]
        written = zip(*(step.writes() for step in steps), strict=True)
        known.update(
            (slot, Layout(*held)) for slot, held in zip(operator.writes, written, strict=True)
        )
    return known


class _Step:
    """One operator on one communicator."""

    def __init__(
        self, graph: str, operator: Operator, communicator: str, known: Mapping[str, Layout]
    ) -> None:
        self._where = f"{graph}: {operator}"
        self._operator = operator
        self._communicator = communicator
        self._rule = operator.rule or Rule()
        self._reads = [
            (index, slot, known[slot].on(communicator))
            for index, slot in enumerate(operator.reads)
            if slot in known
        ]

    def writes(self) -> tuple[Held, ...]:
        """How lies what the operator writes, once all that it needs is there."""
        if self._operator.lane.copies:
            return tuple(held for _, _, held in self._reads)  # a copy of each, partial sums as well
        move = self._rule.moves.get(self._communicator)
        if move is None:
            if self._operator.lane == self._communicator:
                raise LayoutError(
                    f"{self._where} communicates over {self._communicator}, but its rule does not"
                    " say what that changes"
                )
            held = self._alike()
            writes = tuple(self._summed(held, slot) for slot in self._operator.writes)
        else:
            held = self._as_needed(move)
            writes = _each(move.writes, len(self._operator.writes))
        self._check_draws(held)
        gradient = (move.gradient if move is not None else None) or _of_sum(held)
        gradients = _each(gradient, len(self._rule.kept))
        for number, (kept, lies) in enumerate(zip(self._rule.kept, gradients, strict=True)):
            self._check_gradient(number, kept, lies)
        return writes

    def _alike(self) -> Held:
        """How all lies that is read."""
        first, held = "", Held.REPLICATED
        for _, slot, other in self._tensors():
            if other is Held.PARTIAL or other in self._rule.mixes:
                self._refuse(slot, other, "it whole")
            if first and other is not held:
                self._refuse(slot, other, f"it as {first} lies: {held}")
            first, held = slot, other
        return held

    def _as_needed(self, move: Move) -> Held:
        needs = _each(move.reads, len(self._operator.reads))
        first = Held.REPLICATED
        for index, slot, held in self._tensors():
            if held is not needs[index]:
                self._refuse(slot, held, str(needs[index]))
            first = held if first is Held.REPLICATED else first
        return first

    def _summed(self, held: Held, slot: str) -> Held:
        return _of_sum(held) if slot in self._rule.sums else held

    def _check_draws(self, held: Held) -> None:
        key = next((held for _, slot, held in self._reads if slot == self._rule.draws), None)
        alike = held is Held.REPLICATED or held in self._rule.placed
        if key is not None and (key is Held.DISTINCT) is alike:
            needed = "a key for all" if alike else "a key of each rank"
            self._refuse(self._rule.draws, key, f"{needed}, since it draws for what lies {held}")

    def _check_gradient(self, number: int, kept: Kept, held: Held) -> None:
        sharded = self._communicator in kept.sharded
        summed = self._communicator in kept.summed
        if held is Held.REPLICATED:
            fits = not sharded and not summed
        elif held is Held.PARTIAL:
            fits = not sharded and summed
        else:
            fits = sharded and not summed
        if not fits:
            lies = "sharded" if sharded else "replicated"
            later = "is added up later" if summed else "is not added up later"
            raise LayoutError(
                f"{self._where} leaves the gradient of its parameter {number}"
                f" {self._communicator} {held}, but that parameter is {lies}, and its gradient"
                f" {later}"
            )

    def _tensors(self) -> list[tuple[int, str, Held]]:
        """What is read, but for the key of random numbers."""
        return [read for read in self._reads if read[1] != self._rule.draws]

    def _refuse(self, slot: str, held: Held, needed: str) -> None:
        raise LayoutError(
            f"{self._where} reads {slot}, which lies {self._communicator} {held}: it needs {needed}"
        )


def _of_sum(held: Held) -> Held:
    """How a sum over the tokens of what lies so lies itself."""
    return Held.PARTIAL if held in TOKENS else held


def _each(held: Held | tuple[Held, ...], count: int) -> tuple[Held, ...]:
    held = (held,) * count if isinstance(held, Held) else held
    assert len(held) == count, "a rule names as many slots as its operator has"
    return held
