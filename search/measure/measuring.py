"""Measures the operators of graphs: alone, and communication beside what may run with it.

Operators that do the same work share one measurement. What runs and times them is a `Bench`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, combinations
from typing import Protocol

from lightning_dhellam.plan import Graph, Lane, Operator
from lightning_dhellam.search.measure.profile import Fingerprint, Profile
from lightning_dhellam.search.measure.rows import Key, Samples, Timing

_LEADS = 2
"""Computation that is over so many leads after its start is not worth starting behind."""
_WITHIN = 1 / 3
"""Share of computation after which communication is started behind it. An operator may be several
kernels, and the first, a short one, leave room that the long one after it does not."""

Identity = Callable[[Graph, Operator], Hashable]
"""What an operator does, as far as its time depends on it: its kind and its shapes."""


@dataclass(frozen=True)
class Target:
    """An operator to measure, which stands for all that do the same work.

    Attributes:
        key: name of the measurement.
        graph: graph that the operator is part of.
        operator: what runs.
        spare: whether the operator leaves processors to communication.
    """

    key: Key
    graph: Graph
    operator: Operator
    spare: bool = False

    @property
    def computes(self) -> bool:
        """Whether it occupies the compute lane."""
        return self.operator.lane is Lane.COMPUTE

    @property
    def moves(self) -> bool:
        """Whether it moves bytes beside compute."""
        return self.operator.lane.moves


class Bench(Protocol):
    """Runs operators on the device and times them.

    Times are of this rank or maximised over ranks, in seconds.

    Attributes:
        lead: least head start that `behind` can give; 0 where communication cannot be started
            under computation, as on a CPU, where computation holds up the host.
    """

    lead: float

    def shrinks(self, target: Target) -> bool:
        """Tell whether a target can leave processors to communication with the same results."""

    def alone(self, target: Target) -> Samples:
        """Time one operator while nothing else runs."""

    def beside(self, communication: Target, other: Target) -> tuple[Samples, Samples]:
        """Start both, communication first, and time each from the start to its own end.

        `other` computes, or communicates on another lane.
        """

    def behind(
        self, communication: Target, compute: Target, lead: float
    ) -> tuple[Samples, Samples]:
        """Start communication `lead` after computation, and time each from its own start."""


class BenchError(RuntimeError):
    """An operator could not be measured. The message names it."""


Progress = Callable[[int, int, str], None]
"""Called with measurements done, all measurements, and what comes next."""


def nominal_identity(graph: Graph, operator: Operator) -> Hashable:
    """Identify an operator by lane, collective, nominal cost, and sizes of what it writes.

    Operators without a nominal cost are taken for different.
    """
    if not operator.cost:
        return graph.fingerprint, operator.name
    sizes = tuple(graph.bytes_per_token.get(slot) for slot in operator.writes)
    kind = operator.lane, operator.collective
    does = bool(operator.accumulates), operator.varies
    return kind, operator.cost, len(operator.reads), sizes, does


def targets(
    graphs: Iterable[Graph], identity: Identity = nominal_identity
) -> tuple[list[Target], dict[str, dict[str, Key]]]:
    """Return what to measure, and keys of operators by graph fingerprint and operator name."""
    chosen: dict[Hashable, Target] = {}
    keys: dict[str, dict[str, Key]] = {}
    for graph in {graph.fingerprint: graph for graph in graphs}.values():
        own = keys.setdefault(graph.fingerprint, {})
        for operator in graph.operators:
            target = Target(f"{graph.name}/{operator.name}", graph, operator)
            own[operator.name] = chosen.setdefault(identity(graph, operator), target).key
    return list(chosen.values()), keys


def measure(
    bench: Bench,
    graphs: Sequence[Graph],
    fingerprint: Fingerprint,
    *,
    progress: Progress | None = None,
    identity: Identity = nominal_identity,
    launch: float = 0.0,
    inline: bool = False,
    beside: Callable[[Target, Target], bool] | None = None,
    rounds: int = 1,
) -> Profile:
    """Measure every operator of `graphs` alone, and communication beside what may run with it.

    That is computation, and communication of other lanes.

    Args:
        bench: times operators.
        graphs: of every kind of layer, the most frequent first: operators that do the same work
            are called by the first of them.
        fingerprint: conditions that the profile will be valid for.
        progress: is told what is measured next.
        identity: operators with equal ones are measured once.
        launch: seconds the host needs to issue one operator.
        inline: whether compute runs on the host, as it does on CPU.
        beside: whether a communication and another operator are worth measuring together; those
            that are not keep their speed. All by default.
        rounds: how often to go through all measurements. What disturbs the machine for a while
            then spoils some samples of each, and not all samples of some.

    Raises:
        BenchError: names the operator that failed.
    """
    chosen, keys = targets(graphs, identity)
    sparing = {
        target.key: replace(target, key=f"{target.key} (spare)", spare=True)
        for target in chosen
        if target.operator.shrinks and bench.shrinks(target)
    }
    chosen += sparing.values()
    work = _measurements(chosen, beside or (lambda communication, other: True), bench.lead > 0)
    alone: dict[Key, float] = {}
    count = rounds * len(work)
    for number in range(count):
        one = work[number % len(work)]
        if progress is not None:
            progress(number, count, str(one))
        if one.partner is not None and one.behind:
            one.lead = max(bench.lead, _WITHIN * alone[one.partner.key])
        if one.partner is None or alone[one.partner.key] >= _LEADS * one.lead:
            one.take(bench)
            alone.setdefault(one.target.key, one.taken[0][0].quantile(0.5))
    if progress is not None:
        progress(count, count, "done")
    rows = [row for one in work for row in one.rows()]
    lanes = {target.key: target.operator.lane for target in chosen}
    distinct = tuple({graph.fingerprint: graph for graph in graphs}.values())
    spares = {key: target.key for key, target in sparing.items()}
    return Profile(fingerprint, keys, lanes, tuple(rows), launch, distinct, inline, spares)


@dataclass
class _Measurement:
    """What is timed, and the samples that each round took of its operators."""

    target: Target
    partner: Target | None = None
    behind: bool = False
    lead: float = 0.0
    taken: list[tuple[Samples, ...]] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.target.key} beside {self.partner.key}" if self.partner else self.target.key

    def take(self, bench: Bench) -> None:
        """Time it once more. Raises BenchError."""
        try:
            if self.partner is None:
                found: tuple[Samples, ...] = (bench.alone(self.target),)
            elif self.behind:
                found = bench.behind(self.target, self.partner, self.lead)
            else:
                found = bench.beside(self.target, self.partner)
        except Exception as error:
            raise BenchError(f"measuring {self} failed: {error}") from error
        self.taken.append(found)

    def rows(self) -> list[Timing]:
        """Return the rows of all samples; none if it was never timed. Raises BenchError."""
        if not self.taken:
            return []
        rows = [(self.target.key, self.partner.key if self.partner else None)]
        if self.partner is not None:
            rows.append((self.partner.key, self.target.key))
        samples = [
            Samples(tuple(chain.from_iterable(part.seconds for part in parts)))
            for parts in zip(*self.taken, strict=True)
        ]
        try:
            return [
                Timing.of(*keys, own, self.lead) for keys, own in zip(rows, samples, strict=True)
            ]
        except ValueError as error:
            raise BenchError(f"measuring {self} failed: {error}") from error


def _measurements(
    chosen: Sequence[Target], beside: Callable[[Target, Target], bool], behind: bool
) -> list[_Measurement]:
    """Return what to time: each target alone, then the pairs, then compute that is ahead.

    Operators of one lane never run together, and what the host waits for disturbs nobody.
    """
    with_compute = [
        (communication, compute)
        for communication in chosen
        for compute in chosen
        if communication.moves and compute.computes and beside(communication, compute)
    ]
    with_others = [
        (one, other)
        for one, other in combinations(chosen, 2)
        if one.moves and other.moves and one.operator.lane is not other.operator.lane
        if beside(one, other)
    ]
    return [
        *(_Measurement(target) for target in chosen),
        *(_Measurement(*pair) for pair in with_compute),
        *(_Measurement(*pair) for pair in with_others),
        *(_Measurement(*pair, behind=True) for pair in with_compute if behind),
    ]
