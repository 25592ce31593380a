"""Pure functions from graphs to graphs.

`recompute` lets backward make slots of forward again, in place of keeping them. What makes them
stands in the backward graph as all other operators do, so that a plan orders it, its communication
hides under the other strand, and its random numbers, which come from counters, are the same:

    forward    norm -> normal   gather -> whole   gemm ...
    backward   dgrad   gather.again: normal -> whole_again   wgrad: dy, whole_again

`halves` splits backward into what others wait for and what they do not, which can then be done
later, where a stage of a pipeline would have nothing to do:

    input      dgrad: dy -> dx
    weights    gather.again: normal -> whole_again   wgrad: dy, whole_again
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from lightning_dhellam.nearest import suggestion
from lightning_dhellam.plan.graph import SHARED, Graph, GraphPair
from lightning_dhellam.plan.operator import Lane, Operator

Recompute = str | Sequence[str]
"""What is made again: the name of a choice in `CHOICES`, or names of slots and choices."""


AGAIN = ".again"
"""Behind the name of an operator that backward runs again."""


def recompute(pair: GraphPair, slots: Collection[str]) -> GraphPair:
    """The same layer, whose backward makes `slots` of forward again where it needs them.

    Of what makes them again it reads what is not among `slots`, which is saved, or is made again
    too where forward has written over it. What else such an operator writes is taken from it as
    well, and not saved. Slots that forward is handed, or that the host has asked for, are saved in
    any case.
    """
    forward, backward = pair.forward, pair.backward
    again = run_again(pair, slots)
    if not again:
        return pair
    remade = {slot: f"{slot}_again" for o in again for slot in o.writes}
    clones = [
        replace(renamed(operator, remade), name=f"{operator.name}{AGAIN}", remakes=())
        for operator in again
    ]
    readers = [renamed(operator, remade) for operator in backward.operators]
    sizes = {remade[slot]: forward.bytes_per_token[slot] for slot in remade}
    return GraphPair(
        forward,
        replace(
            backward,
            operators=tuple(_just_in_time(clones, readers)),
            bytes_per_token={**backward.bytes_per_token, **sizes},
        ),
    )


def halves(graph: Graph) -> tuple[Graph, Graph]:
    """Split a backward graph: what the gradient of the layer's input needs, and all the rest.

    The rest are the gradients of weights, and what only they read. It is handed nothing and hands
    on nothing: what it reads of the first half stays on the tape of the layer, as what forward has
    saved does. A half may have no operators, such as the first one of an embedding.
    """
    needed = set(graph.outputs)
    first = set[str]()
    for operator in reversed(graph.operators):
        if needed & set(operator.writes):
            first.add(operator.name)
            needed.update(operator.reads)
    early = tuple(o for o in graph.operators if o.name in first)
    late = tuple(o for o in graph.operators if o.name not in first)
    return (
        replace(graph, name=f"{graph.name}.input", operators=early),
        replace(
            graph,
            name=f"{graph.name}.weights",
            operators=late,
            inputs=(),
            outputs=(),
            receives=(),
            sends=(),
        ),
    )


def left_bytes(pair: GraphPair) -> float:
    """Predict what the first half of a layer's backward leaves for the second, in bytes per token.

    It is what the second reads of forward, and of the first.
    """
    sizes = {**pair.forward.bytes_per_token, **pair.backward.bytes_per_token}
    _, second = halves(pair.backward)
    return sum(sizes.get(slot, 0.0) for slot in second.foreign)


def run_again(pair: GraphPair, slots: Collection[str]) -> list[Operator]:
    """The operators of forward, or parts of them, that `recompute` runs again, in their order."""
    again = _Remaking(pair.forward, frozenset(slots))
    for slot in pair.saved:
        again.want(slot)
    return again.operators


class _Remaking:
    """Which operators of a forward graph backward runs again, in their order there.

    Args:
        forward: the graph.
        slots: that may be made again.
    """

    def __init__(self, forward: Graph, slots: frozenset[str]) -> None:
        self._forward = forward
        self._slots = slots | {read for o in forward.operators for _, read in o.takes}
        self._wanted: dict[str, Operator] = {}

    @property
    def operators(self) -> list[Operator]:
        """What was wanted so far, each after those that it reads of."""
        order = [o for own in self._forward.operators for o in (own, *own.remakes)]
        return [o for o in order if o.name in self._wanted]

    def want(self, slot: str) -> None:
        """Make a slot again, if it may be, and what that needs."""
        maker = self._maker(slot)
        if maker is None or maker.name in self._wanted:
            return
        self._wanted[maker.name] = maker
        for read in maker.reads:
            self.want(read)

    def _maker(self, slot: str) -> Operator | None:
        own = self._forward.producers.get(slot)
        if own is None or slot not in self._slots or own.lane is Lane.HOST:
            return None
        # Its results are made by parts where the parts do not need what only the whole makes.
        parts = [part for part in own.remakes if slot in part.writes]
        if parts and not self._slots & {*parts[0].reads} & {*own.writes}:
            return parts[0]
        return own


def renamed(operator: Operator, names: Mapping[str, str]) -> Operator:
    """The same operator with other names for slots."""

    def of(slots: Iterable[str]) -> tuple[str, ...]:
        return tuple(names.get(slot, slot) for slot in slots)

    takes = tuple(
        (names.get(write, write), names.get(read, read)) for write, read in operator.takes
    )
    return replace(
        operator,
        reads=of(operator.reads),
        writes=of(operator.writes),
        takes=takes,
        records=of(operator.records),
    )


def _just_in_time(clones: Iterable[Operator], readers: Iterable[Operator]) -> Iterator[Operator]:
    """The readers in order, each clone before the first that needs it."""
    makers = {slot: clone for clone in clones for slot in clone.writes}
    made: set[str] = set()

    def before(operator: Operator) -> Iterator[Operator]:
        for slot in operator.reads:
            maker = makers.get(slot)
            if maker is not None and maker.name not in made:
                made.add(maker.name)
                yield from before(maker)
                yield maker

    for reader in readers:
        yield from before(reader)
        yield reader


def _nothing(pair: GraphPair) -> frozenset[str]:
    return frozenset()


def _gathers(pair: GraphPair) -> frozenset[str]:
    """What is gathered of a light slot: the inputs of column-parallel linear layers.

    So is what light operators make of that alone: the same in 8 bits.
    """
    slots: set[str] = set()
    for operator in pair.forward.operators:
        made = operator.computes and operator.reads and slots.issuperset(operator.reads)
        if operator.light and (operator.is_communication or made):
            slots.update(operator.writes)
    return frozenset(slots)


def _selective(pair: GraphPair) -> frozenset[str]:
    """What light operators make of slots that are there: of those saved, and of such again.

    Slots much narrower than the layer's input are not worth an operator.
    """
    forward = pair.forward
    saved = {*pair.saved, *forward.inputs}
    saved.update(s for o in forward.operators if o.lane is Lane.HOST for s in o.writes)
    light: set[str] = set()
    for own in forward.operators:
        for operator in (*own.remakes, own):
            reads = {slot for slot in operator.reads if not slot.startswith(SHARED)}
            if operator.light and reads <= saved | light:
                light.update(operator.writes)
    least = sum(forward.bytes_per_token[slot] for slot in forward.inputs) / 2
    return frozenset(s for s in light if forward.bytes_per_token[s] >= least)


def _full(pair: GraphPair) -> frozenset[str]:
    return pair.forward.written


CHOICES: dict[str, Callable[[GraphPair], frozenset[str]]] = {
    "none": _nothing,
    "gathers": _gathers,
    "selective": _selective,
    "full": _full,
}
"""What is made again, by the names that users know: the slots of a layer."""


def chosen(pair: GraphPair, what: Recompute) -> frozenset[str]:
    """The slots of a layer that `what` names."""
    names = (what,) if isinstance(what, str) else what
    found = (CHOICES[one](pair) if one in CHOICES else {one} for one in names)
    return frozenset().union(*found)


def of_head(what: Recompute) -> tuple[str, ...]:
    """What is made again of the head where `what` is of layers: choices save nothing more there
    than what is gathered, since logits would cost a GEMM as large as any. Slots can be named."""
    names = (what,) if isinstance(what, str) else what
    return tuple("gathers" if one in ("selective", "full") else one for one in names)


def check_recompute(what: Recompute, slots: Collection[str]) -> None:
    """Refuse what is neither a choice nor one of the slots that layers have.

    Raises:
        ValueError: with the nearest name.
    """
    known = (*CHOICES, *sorted(slots))
    for name in (what,) if isinstance(what, str) else what:
        if name not in known:
            raise ValueError(
                f"recompute names {name!r}, which no layer has: use {' or '.join(CHOICES)}, or a"
                f" list with some of {', '.join(known[len(CHOICES) :])}" + suggestion(name, known)
            )
