"""Operators of one layer, ordered by the slots that they read and write."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from lightning_dhellam.plan.agreement import LayoutError, follow
from lightning_dhellam.plan.layout import Layout
from lightning_dhellam.plan.operator import Operator, Strand

BATCH_PREFIX = "batch."
"""Slots of the micro-batch itself (tokens, labels, random key): every layer may read them."""

STEP_PREFIX = "step.layer."
"""Slots of a layer that all micro-batches of a step read (weights in 8 bits)."""

SHARED = (BATCH_PREFIX, STEP_PREFIX)
"""How the names of slots begin that are on no micro-batch's tape of a layer."""

BEGIN = "step.begin"
"""A slot without a value, which is there when a prologue or an epilogue begins."""


class Ends(NamedTuple):
    """What a step has beside its layers: operators that run in order, with slots of their own.

    Attributes:
        prologue: what every step begins with.
        epilogue: what a step that trains ends with.
    """

    prologue: tuple[Operator, ...] = ()
    epilogue: tuple[Operator, ...] = ()


_AND = "+"
"""In a name, between the kind of a layer and what its backward makes again."""

_MANY = 4

Kind = tuple[str, str]
"""Fingerprints of the forward and the backward graph; empty for a missing strand."""


@dataclass(frozen=True)
class Graph:
    """The operators of one layer in one direction.

    The order of `operators` is the default order: every operator stands after those that write
    what it reads.

    Attributes:
        name: kind of the layer, such as `transformer`, and what its backward makes again where that
            is not the usual choice: `transformer+full`.
        direction: forward or backward.
        operators: in default order.
        inputs: slots that the previous graph of the strand hands over (`x`, or `dy`).
        outputs: slots handed to the next graph of the strand (`y`, or `dx`).
        bytes_per_token: size of each slot that is handed over or written: bytes on this rank for
            each token of the micro-batch.
        receives: transfers that write the inputs, which then no graph hands over. They are posted
            a visit ahead, and are no part of a plan.
        sends: transfers that read the outputs, which then no graph is handed. They start as soon
            as those are there, and are no part of a plan.
        layouts: how its inputs and the slots of the micro-batch lie. With None, of graphs that are
            not run, nobody asks whether the operators agree.
        preparation: operators that read nothing and write slots of the step, once before its first
            micro-batch: of a forward graph, for both directions. They are no part of a plan.
        step_bytes: size of each of those slots, which live as long as the step, in bytes.
    """

    name: str
    direction: Strand
    operators: tuple[Operator, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    bytes_per_token: Mapping[str, float] = field(default_factory=dict, compare=False)
    receives: tuple[Operator, ...] = ()
    sends: tuple[Operator, ...] = ()
    layouts: Mapping[str, Layout] | None = field(default=None, repr=False, compare=False)
    preparation: tuple[Operator, ...] = ()
    step_bytes: Mapping[str, int] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        known = set(self.inputs)
        names: set[str] = set()
        for operator in self.operators:
            assert operator.name not in names, f"{self}: operator {operator} stands twice"
            names.add(operator.name)
            later = self.written & set(operator.reads) - known
            assert not later, f"{self}: {operator} reads {sorted(later)} before it is written"
            twice = known & set(operator.writes)
            assert not twice, f"{self}: {operator} writes {sorted(twice)} a second time"
            known.update(operator.writes)
        missing = set(self.outputs) - known
        assert not missing, f"{self}: no operator writes the output {sorted(missing)}"
        if self.receives:
            received = tuple(slot for o in self.receives for slot in o.writes)
            assert received == self.inputs, f"{self} receives {received}, reads {self.inputs}"
        if self.sends:
            sent = tuple(slot for o in self.sends for slot in o.reads)
            assert sent == self.outputs, f"{self} sends {sent}, writes {self.outputs}"
        if not self.foreign:
            self.lies({})  # refuses operators that do not agree

    def __str__(self) -> str:
        return f"{self.name} {self.direction}"

    def at(self, length: int) -> Graph:
        """The same graph with the nominal costs of sequences of `length` tokens."""
        if not any(operator.growth for operator in self.operators):
            return self
        return replace(self, operators=tuple(o.at(length) for o in self.operators))

    @cached_property
    def written(self) -> frozenset[str]:
        """Every slot that an operator of this graph writes."""
        return frozenset(slot for operator in self.operators for slot in operator.writes)

    @cached_property
    def moves(self) -> bool:
        """Whether an operator moves bytes beside compute; transfers do not count."""
        return any(operator.moves for operator in self.operators)

    @cached_property
    def by_name(self) -> dict[str, Operator]:
        """Operators by name."""
        return {operator.name: operator for operator in self.operators}

    @cached_property
    def producers(self) -> dict[str, Operator]:
        """The operator that writes each slot."""
        return {slot: operator for operator in self.operators for slot in operator.writes}

    @cached_property
    def predecessors(self) -> dict[str, tuple[str, ...]]:
        """For each operator the names of those that write what it reads."""
        return {
            operator.name: tuple(
                dict.fromkeys(
                    self.producers[slot].name for slot in operator.reads if slot in self.producers
                )
            )
            for operator in self.operators
        }

    @cached_property
    def followers(self) -> dict[str, tuple[str, ...]]:
        """For each operator the names of those that read what it writes."""
        return {
            operator.name: tuple(
                name for name, before in self.predecessors.items() if operator.name in before
            )
            for operator in self.operators
        }

    @property
    def is_link(self) -> bool:
        """Whether its strand goes through it: it is handed something, or hands something on."""
        return bool(self.inputs or self.outputs)

    @property
    def taken(self) -> tuple[str, ...]:
        """The inputs that the previous graph of the strand hands over."""
        return () if self.receives else self.inputs

    @property
    def handed(self) -> tuple[str, ...]:
        """The outputs that are handed to the next graph of the strand."""
        return () if self.sends else self.outputs

    @cached_property
    def readers(self) -> Counter[str]:
        """How many operators read each slot.

        An output counts one reader more: the next graph, or what sends it.
        """
        counts = Counter(slot for operator in self.operators for slot in set(operator.reads))
        counts.update(self.outputs)
        return counts

    @cached_property
    def foreign(self) -> tuple[str, ...]:
        """Slots read here and neither written here nor handed over: what must have been saved."""
        own = self.written | set(self.inputs)
        reads = (slot for operator in self.operators for slot in operator.reads)
        return tuple(dict.fromkeys(s for s in reads if s not in own and not s.startswith(SHARED)))

    @cached_property
    def of_step(self) -> frozenset[str]:
        """Slots of the step that an operator reads."""
        reads = (slot for operator in self.operators for slot in operator.reads)
        return frozenset(slot for slot in reads if slot.startswith(STEP_PREFIX))

    def lies(self, saved: Mapping[str, Layout]) -> dict[str, Layout]:
        """How every slot lies, the `saved` ones of the other direction as given.

        Raises:
            LayoutError: the operators do not agree.
        """
        if self.layouts is None:
            return {}
        return follow(str(self), self.operators, {**saved, **self.layouts})

    @cached_property
    def fingerprint(self) -> str:
        """A digest of names, lanes and slots: two graphs with the same one can share a plan."""
        lines = [f"{self} {self.inputs} {self.outputs}"]
        lines += [f"{o.name} {o.lane} {o.reads} {o.writes}" for o in self.operators]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def called(kind: str, *choices: str) -> str:
    """The name of a kind of layer whose backward makes again what these choices name.

    Many of them are counted.
    """
    if len(choices) > _MANY:
        choices = (f"{len(choices)}-slots",)
    return _AND.join((kind, *choices))


def kind_in(name: str) -> str:
    """The kind of a layer of this name."""
    return name.partition(_AND)[0]


def kind_of(forward: Graph | None, backward: Graph | None) -> Kind:
    """What identifies a pair of graphs."""
    return (forward.fingerprint if forward else "", backward.fingerprint if backward else "")


@dataclass(frozen=True)
class GraphPair:
    """A layer in both directions. What backward reads of forward's slots is what is saved."""

    forward: Graph
    backward: Graph

    def __post_init__(self) -> None:
        assert self.forward.name == self.backward.name
        assert not self.forward.foreign, f"{self.forward} reads unknown {self.forward.foreign}"
        known = self.forward.written | set(self.forward.inputs)
        made = {slot for operator in self.forward.preparation for slot in operator.writes}
        missing = (self.forward.of_step | self.backward.of_step) - made
        assert not missing, f"{self.forward} has no preparation that writes {sorted(missing)}"
        unknown = set(self.backward.foreign) - known
        assert not unknown, f"{self.backward} reads {sorted(unknown)}, which forward never writes"
        clash = self.backward.written & known
        assert not clash, f"{self.backward} writes slots of forward: {sorted(clash)}"
        self._check_gradients()

    def at(self, length: int) -> GraphPair:
        """The same layer with the nominal costs of sequences of `length` tokens."""
        return GraphPair(self.forward.at(length), self.backward.at(length))

    @cached_property
    def lies(self) -> dict[str, Layout]:
        """How every slot lies; empty where the graphs do not say how their inputs do."""
        forward = self.forward.lies({})
        return {**forward, **self.backward.lies(forward)}

    def _check_gradients(self) -> None:
        """Refuse a gradient that lies otherwise than what it is the gradient of."""
        lies = self.lies
        for slot in (*self.forward.inputs, *self.forward.outputs):
            if (back := f"d{slot}") in lies and lies[back] != lies[slot]:
                raise LayoutError(
                    f"{self.backward}: {back} lies {lies[back]}, but {slot} lies {lies[slot]}"
                )

    @property
    def name(self) -> str:
        """Name of both graphs."""
        return self.forward.name

    @property
    def saved(self) -> tuple[str, ...]:
        """Slots of forward that backward reads: the saved activations, derived."""
        return self.backward.foreign

    def saved_bytes(self, tokens: int) -> int:
        """Predicted bytes of saved activations of one micro-batch of `tokens` tokens."""
        sizes = self.forward.bytes_per_token
        return round(sum(sizes[slot] for slot in self.saved) * tokens)


def check_chain(layers: Sequence[GraphPair]) -> None:
    """Refuse layers of which one hands on something that the next needs to lie otherwise.

    Raises:
        LayoutError: naming both graphs, the slot, how it lies and what is needed.
    """
    for before, after in pairwise(layers):
        handovers = (
            (before, before.forward, after, after.forward),
            (after, after.backward, before, before.backward),
        )
        for source, giving, target, taking in handovers:
            for slot, needed in zip(giving.handed, taking.taken, strict=True):
                if source.lies and target.lies and source.lies[slot] != target.lies[needed]:
                    raise LayoutError(
                        f"{giving} hands on {slot}, which lies {source.lies[slot]};"
                        f" {taking} needs {target.lies[needed]}"
                    )
