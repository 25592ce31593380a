"""The machine model: how long operators take in a given order. `machine` has the rule, compiled.

There is one compute lane and one lane per communicator. Each lane runs its operators in issue
order; an operator starts when its lane is free, what it reads is there, and the host has issued
it. While a compute operator and a communication operator run together, each proceeds at one over
its slowdown, which depends on the two and on which of them began first: a kernel that is running
has the processors that it needs, and one that comes later gets what is left.

    compute  |== fc1.gemm at 1/1.1 ==|= fc1.gemm =|
    tp       |== grad_gather at 1/1.3 ==|
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lightning_dhellam.plan import Graph, Issue, Lane, Plan, Strand
from lightning_dhellam.plan.plan import Row
from lightning_dhellam.search.measure.profile import Clock, Key, Profile, spread
from lightning_dhellam.search.model.machine import Array

_INSTANT = 1e-7
"""Seconds that anything takes at least."""
Spared = frozenset[tuple[str, str]]
"""Operators that leave processors to communication, by graph fingerprint and name."""
Slowdowns = Mapping[tuple[Key, Key], tuple[float, float]]
_Run = tuple[tuple[float, float], tuple[float, float]]
"""Seconds of communication and of compute: alone, and started together."""
_SLOWEST = 20.0
"""A measured slowdown above this is taken for an accident of measurement."""
_SAMPLES = 24
_ALIKE = 1.25
"""Slowdowns that differ by less are taken for the same."""


@dataclass(frozen=True)
class Sample:
    """Times that a measurement gave: `seconds`, `slowdowns` and `behind` of `Costs`."""

    seconds: Mapping[Key, float]
    slowdowns: Slowdowns
    behind: Slowdowns

    @classmethod
    def of(cls, profile: Profile) -> Sample:
        """The medians of a profile."""
        alone = {row.operator: row.median for row in profile.timings if row.partner is None}
        return cls(
            alone, _slowdowns(profile, alone, led=False), _slowdowns(profile, alone, led=True)
        )

    @property
    def depends_on_who_begins(self) -> bool:
        """Whether some two operators run differently when communication begins and when not."""
        pairs = ((self.slowdowns.get(key, (1.0, 1.0)), value) for key, value in self.behind.items())
        return any(
            not 1 / _ALIKE < one / other < _ALIKE
            for first, later in pairs
            for one, other in zip(first, later, strict=True)
        )


@dataclass(frozen=True)
class Costs:
    """What the machine model needs to know about operators.

    Attributes:
        keys: of each operator, by graph fingerprint and operator name.
        seconds: of each key, alone.
        slowdowns: of communication and of compute, by communication key and compute key; 1
            where absent, and never below. Measured on a host, the same for all compute.
        behind: the same where communication started while the compute operator was running,
            which may have taken all that it needs; as `slowdowns` where absent.
        compute: the keys of compute operators.
        spares: by key, that of the operator when it leaves processors to communication.
        spared: the operators that do: in all plans, or in none.
        clock: how operators slow down as compute fills more of the time.
        samples: what other measurements could have given.
        launch: seconds the host needs to issue one operator.
        inline: compute runs on the host, so that nothing is issued while it runs, and issuing
            waits for what the operator reads; memory is given back at once. So it is on CPU.
    """

    keys: Mapping[str, Mapping[str, Key]]
    seconds: Mapping[Key, float]
    slowdowns: Slowdowns = field(default_factory=dict)
    launch: float = 0.0
    inline: bool = False
    behind: Slowdowns = field(default_factory=dict)
    compute: frozenset[Key] = frozenset()
    spares: Mapping[Key, Key] = field(default_factory=dict)
    spared: Spared = frozenset()
    clock: Clock = field(default_factory=Clock)
    samples: tuple[Sample, ...] = ()

    @classmethod
    def of(cls, profile: Profile) -> Costs:
        """Costs from measured times."""
        measured = Sample.of(profile)
        # Where it does not matter who begins, small differences of times stay small.
        count = _SAMPLES if measured.depends_on_who_begins else 0
        return cls(
            profile.operators,
            measured.seconds,
            measured.slowdowns,
            profile.launch,
            profile.inline,
            measured.behind,
            frozenset(key for key, lane in profile.lanes.items() if lane is Lane.COMPUTE),
            profile.spares,
            clock=profile.clock,
            samples=tuple(Sample.of(other) for other in spread(profile, count)),
        )

    @classmethod
    def nominal(cls, graphs: Iterable[Graph], tokens: int) -> Costs:
        """Costs from the operators' nominal ones, for a micro-batch of `tokens` tokens."""
        keys: dict[str, dict[str, Key]] = {}
        seconds: dict[Key, float] = {}
        for graph in graphs:
            keys[graph.fingerprint] = {o.name: f"{graph}/{o.name}" for o in graph.operators}
            seconds.update({f"{graph}/{o.name}": o.cost * tokens for o in graph.operators})
        return cls(keys, seconds)

    def key(self, graph: Graph, operator: str) -> Key:
        """The key of an operator. Refuses one that was not measured."""
        try:
            key = self.keys[graph.fingerprint][operator]
        except KeyError:
            raise ValueError(
                f"operator '{operator}' of graph '{graph}' ({graph.fingerprint}) is not in the"
                " profile: measure this model"
            ) from None
        return self.spares.get(key, key) if (graph.fingerprint, operator) in self.spared else key

    def alone(self, graph: Graph, operator: str) -> float:
        """Seconds of an operator while nothing else runs."""
        return self.seconds[self.key(graph, operator)]

    @property
    def sparable(self) -> Spared:
        """The operators that were measured leaving processors to communication."""
        return frozenset(
            (graph, name)
            for graph, own in self.keys.items()
            for name, key in own.items()
            if key in self.spares
        )

    def sparing(self, operators: Iterable[tuple[str, str]]) -> Costs:
        """The same where these operators, and no others, leave processors to communication."""
        return replace(self, spared=frozenset(operators))

    def marked(self, plan: Plan, graphs: Mapping[Strand, Graph | None]) -> Plan:
        """The plan with a mark at each row whose operator is to leave processors."""

        def mark(row: Row) -> Row:
            graph = graphs[row.strand] if isinstance(row, Issue) else None
            if graph is None or not isinstance(row, Issue):
                return row
            return replace(row, spare=(graph.fingerprint, row.operator) in self.spared)

        return replace(plan, rows=tuple(map(mark, plan.rows))) if self.spared else plan

    def clocked(self, share: float) -> Costs:
        """The same where compute works for `share` of the time."""
        slowdown = self.clock.slowdown(share)
        if slowdown == 1.0:
            return self
        slowdowns = slowdown, self.clock.slowdown_of_communication(share)
        seconds = self._slowed(self.seconds, *slowdowns)
        samples = tuple(
            replace(sample, seconds=self._slowed(sample.seconds, *slowdowns))
            for sample in self.samples
        )
        return replace(self, seconds=seconds, clock=Clock(), samples=samples)

    def at_work(self, graphs: Iterable[Graph]) -> Costs:
        """The same where compute works for as much of the time as the lanes of `graphs` allow."""
        load = dict.fromkeys(Lane, 0.0)
        for graph in graphs:
            for operator in graph.operators:
                load[operator.lane] += self.alone(graph, operator.name)
        longest = max(load.values())
        return self.clocked(load[Lane.COMPUTE] / longest if longest else 1.0)

    def _slowed(
        self, seconds: Mapping[Key, float], compute: float, communication: float
    ) -> dict[Key, float]:
        return {
            key: own * (compute if key in self.compute else communication)
            for key, own in seconds.items()
        }

    def without_slowdowns(self) -> Costs:
        """The same, as if lanes did not disturb each other: never slower."""
        samples = tuple(replace(sample, slowdowns={}, behind={}) for sample in self.samples)
        return replace(self, slowdowns={}, behind={}, samples=samples)

    @property
    def others(self) -> tuple[Costs, ...]:
        """The same by each of the samples."""
        return tuple(
            replace(
                self, seconds=one.seconds, slowdowns=one.slowdowns, behind=one.behind, samples=()
            )
            for one in self.samples
        )

    def arrays(self, keys: Sequence[Key]) -> tuple[Array, Array]:
        """`tables` by the numbers of communication and compute among `keys`."""
        together, behind = (
            np.array([[table.get((a, b), (1.0, 1.0)) for b in keys] for a in keys], float)
            for table in self.tables()
        )
        return together, behind

    def tables(self) -> tuple[Slowdowns, Slowdowns]:
        """Slowdowns of communication that starts first or together, and of what starts behind."""
        return self.slowdowns, {**self.slowdowns, **self.behind}


def _slowdowns(
    profile: Profile, alone: Mapping[Key, float], *, led: bool
) -> dict[tuple[Key, Key], tuple[float, float]]:
    """From the rows in which computation was ahead, or from those in which both began at once."""
    rows = {
        (row.operator, row.partner): row
        for row in profile.timings
        if row.partner is not None and bool(row.lead) is led
    }
    runs: dict[tuple[Key, Key], _Run] = {}
    for (communication, compute), row in rows.items():
        if compute is not None and profile.lanes[communication] is not Lane.COMPUTE:
            other = rows[compute, communication]
            runs[communication, compute] = (
                (alone[communication], max(alone[compute] - row.lead, _INSTANT)),
                (row.median, max(other.median - row.lead, _INSTANT)),
            )
    if not profile.inline:
        return {pair: slowdown_of([run]) for pair, run in runs.items()}
    of_each: dict[Key, list[_Run]] = {}
    for (communication, _), run in runs.items():
        of_each.setdefault(communication, []).append(run)
    on_the_host = {key: _on_the_host(own) for key, own in of_each.items()}
    return {pair: on_the_host[pair[0]] for pair in runs}


def _on_the_host(runs: Sequence[_Run]) -> tuple[float, float]:
    """The slowdowns of one communication and of any compute, where both run on the host.

    The processor's time that communication takes does not depend on what computes meanwhile. Most
    of it is at the beginning, so that compute which ends before it would seem to be slowed more.
    """
    outlasted = [run for run in runs if run[1][0] <= run[1][1]]
    return slowdown_of(outlasted or runs)


def slowdown_of(runs: Iterable[_Run]) -> tuple[float, float]:
    """The slowdowns of two operators from their times alone and started together.

    They disturb each other until one of them ends. In that time the one that ends first does all
    of its work, and the other what it did not have to do alone afterwards. Of several runs the
    times and the work are summed.
    """
    shared, done = 0.0, [0.0, 0.0]
    for alone, together in runs:
        meanwhile = min(together)
        shared += meanwhile
        for x in range(2):
            done[x] += alone[x] - (together[x] - meanwhile)
    factors = (shared / work if work > 0 else _SLOWEST for work in done)
    low, high = (min(max(factor, 1.0), _SLOWEST) for factor in factors)
    return low, high


def lanes_of(graphs: Iterable[Graph]) -> tuple[Lane, ...]:
    """Compute and the communication lanes that `graphs` use, in the order of `Lane`."""
    used = {operator.lane for graph in graphs for operator in graph.operators}
    return (Lane.COMPUTE, *(lane for lane in Lane if lane in used and lane is not Lane.COMPUTE))
