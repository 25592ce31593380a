"""The machine model: how long operators take in a given order. `machine` has the rule, compiled.

There is one compute lane and one lane per communicator. Each lane runs its operators in issue
order; an operator starts when its lane is free, what it reads is there, and the host has issued
it. Where the host waits for a value, on the lane `host`, it issues nothing until that is there:
the device is left with what it was given before. While a compute operator and a communication
operator run together, each proceeds at one over its slowdown, which depends on the two and on
which of them began first: a kernel that is running has the processors that it needs, and one that
comes later gets what is left. Two communication operators of different lanes, which share links
and processors, slow each other down as well. An operator that several disturb is slowed by the
product.

    compute  |== fc1.gemm at 1/1.1 ==|= fc1.gemm =|
    tp       |== grad_gather at 1/1.3 ==|= at 1/1.2 =|
    cp                                  |= exchange at 1/1.5 =|
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lightning_dhellam.plan import Graph, Issue, Lane, Plan, Strand
from lightning_dhellam.plan.plan import Row
from lightning_dhellam.search.measure import Clock, Key, Profile, mean_of, spread
from lightning_dhellam.search.model.arrays import Array
from lightning_dhellam.search.model.slowdowns import Slowdowns, slowdowns

Spared = frozenset[tuple[str, str]]
"""Operators that leave processors to communication, by graph fingerprint and name."""
_SAMPLES = 24
"""How many profiles that the same measurement could have given an order is judged by."""
_ALIKE = 1.25
"""Slowdowns that differ by less are taken for the same."""


@dataclass(frozen=True)
class Sample:
    """The times that one measurement gave: `seconds`, `slowdowns` and `behind` of `Costs`."""

    seconds: Mapping[Key, float]
    slowdowns: Slowdowns
    behind: Slowdowns

    @classmethod
    def of(cls, profile: Profile) -> Sample:
        """Take the medians of a profile."""
        alone = {row.operator: row.median for row in profile.timings if row.partner is None}
        return cls(alone, slowdowns(profile, alone, led=False), slowdowns(profile, alone, led=True))

    def times(self, ratios: Mapping[Key, float]) -> Sample:
        """Return the times of operators that take so many times as long; 1 where absent."""
        seconds = {key: own * ratios.get(key, 1.0) for key, own in self.seconds.items()}
        return replace(self, seconds=seconds)

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
        keys: key of each operator, by graph fingerprint and operator name.
        seconds: seconds of each key while nothing else runs; the mean over routings where they
            depend on those.
        slowdowns: how much two operators that run together slow each other down: the first, a
            communication, and the second, compute or a communication of another lane, by their
            keys. 1 where absent, and never below. On a host they are the same for all compute.
        behind: slowdowns where communication started while the compute operator was running,
            which may have taken all that it needs; as `slowdowns` where absent.
        compute: keys of compute operators.
        spares: by key of an operator, its key when it leaves processors to communication.
        spared: operators that leave processors to communication, whatever the plan.
        clock: how operators slow down as compute fills more of the time.
        samples: times that other measurements could have given, and by other routings.
        launch: seconds the host needs to issue one operator.
        inline: whether compute runs on the host, as on CPU: nothing is then issued while it runs,
            issuing waits for what the operator reads, and memory is given back at once.
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
        """Make costs from measured times."""
        measured = Sample.of(profile)
        # Where it does not matter who begins, small differences of times stay small.
        count = _SAMPLES if measured.depends_on_who_begins else 0
        samples = [Sample.of(other) for other in spread(profile, count)]
        routings = _ratios(profile)
        if routings:
            samples = samples or [measured] * len(routings)
            samples = [
                one.times(routings[number % len(routings)]) for number, one in enumerate(samples)
            ]
            measured = measured.times(_ratios(profile, mean_of(profile))[0])
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
            samples=tuple(samples),
        )

    @classmethod
    def nominal(cls, graphs: Iterable[Graph], tokens: int) -> Costs:
        """Make costs from the nominal ones of operators, for a micro-batch of `tokens` tokens."""
        keys: dict[str, dict[str, Key]] = {}
        seconds: dict[Key, float] = {}
        for graph in graphs:
            keys[graph.fingerprint] = {o.name: f"{graph}/{o.name}" for o in graph.operators}
            seconds.update({f"{graph}/{o.name}": o.cost * tokens for o in graph.operators})
        return cls(keys, seconds)

    def key(self, graph: Graph, operator: str) -> Key:
        """Return the key of an operator.

        Raises:
            ValueError: the operator was not measured.
        """
        try:
            key = self.keys[graph.fingerprint][operator]
        except KeyError:
            raise ValueError(
                f"operator '{operator}' of graph '{graph}' ({graph.fingerprint}) is not in the"
                " profile: measure this model"
            ) from None
        return self.spares.get(key, key) if (graph.fingerprint, operator) in self.spared else key

    def alone(self, graph: Graph, operator: str) -> float:
        """Return the seconds of an operator while nothing else runs."""
        return self.seconds[self.key(graph, operator)]

    @property
    def sparable(self) -> Spared:
        """Name the operators that were measured leaving processors to communication."""
        return frozenset(
            (graph, name)
            for graph, own in self.keys.items()
            for name, key in own.items()
            if key in self.spares
        )

    def sparing(self, operators: Iterable[tuple[str, str]]) -> Costs:
        """Return costs where these operators, and no others, leave processors to communication."""
        return replace(self, spared=frozenset(operators))

    def marked(self, plan: Plan, graphs: Mapping[Strand, Graph | None]) -> Plan:
        """Return the plan with a mark at each row whose operator is to leave processors."""

        def mark(row: Row) -> Row:
            graph = graphs[row.strand] if isinstance(row, Issue) else None
            if graph is None or not isinstance(row, Issue):
                return row
            return replace(row, spare=(graph.fingerprint, row.operator) in self.spared)

        return replace(plan, rows=tuple(map(mark, plan.rows))) if self.spared else plan

    def clocked(self, share: float) -> Costs:
        """Return costs of a device on which compute works for `share` of the time."""
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
        """Return costs where compute works for as much of the time as `graphs` let it."""
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
        """Return costs as if lanes did not disturb each other: no order is slower by them."""
        samples = tuple(replace(sample, slowdowns={}, behind={}) for sample in self.samples)
        return replace(self, slowdowns={}, behind={}, samples=samples)

    @property
    def others(self) -> tuple[Costs, ...]:
        """Return costs by each of the samples."""
        return tuple(
            replace(
                self, seconds=one.seconds, slowdowns=one.slowdowns, behind=one.behind, samples=()
            )
            for one in self.samples
        )

    def arrays(self, keys: Sequence[Key]) -> tuple[Array, Array]:
        """Return `tables` as arrays: row and column are numbers of keys among `keys`."""
        together, behind = (
            np.array([[table.get((a, b), (1.0, 1.0)) for b in keys] for a in keys], float)
            for table in self.tables()
        )
        return together, behind

    def tables(self) -> tuple[Slowdowns, Slowdowns]:
        """Return slowdowns where communication starts first or together, and where behind."""
        return self.slowdowns, {**self.slowdowns, **self.behind}


def _ratios(profile: Profile, *others: Mapping[Key, float]) -> list[Mapping[Key, float]]:
    """Return how many times as long operators take by other times than by those of the profile.

    The others are those of its routings, unless they are given. Operators that leave processors
    vary as they do without.
    """
    first = profile.routings[0] if profile.routings else {}
    found: list[Mapping[Key, float]] = []
    for seconds in others or profile.routings:
        ratios = {key: seconds[key] / own for key, own in first.items()}
        spares = {spare: ratios[key] for key, spare in profile.spares.items() if key in ratios}
        found.append(ratios | spares)
    return found


def lanes_of(graphs: Iterable[Graph]) -> tuple[Lane, ...]:
    """Return compute and the other lanes that `graphs` use, in the order of `Lane`."""
    used = {operator.lane for graph in graphs for operator in graph.operators}
    return (Lane.COMPUTE, *(lane for lane in Lane if lane in used and lane is not Lane.COMPUTE))
