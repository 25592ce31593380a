"""Measured times of operators: typed rows, stored as JSON that a person can read.

An operator is measured alone, and each communication operator beside each compute operator that
may share its pair of layers. Operators that do the same work share one measurement.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from math import log
from pathlib import Path
from statistics import median
from typing import Protocol

from lightning_dhellam.files import (
    FileError,
    differences,
    load_json,
    put_in_lines,
    save_text,
)
from lightning_dhellam.plan import Graph, Lane, Operator
from lightning_dhellam.search.measure.graphfile import fields_of, graph_from

FORMAT = 3

_LEADS = 2
"""Computation that is over so many leads after its start is not worth starting behind."""
_WITHIN = 1 / 3
"""Share of computation after which communication is started behind it. An operator may be several
kernels, and the first, a short one, leave room that the long one after it does not."""

Key = str
"""Names a measured operator: that of the first operator which does this work."""

Identity = Callable[[Graph, Operator], Hashable]
"""What an operator does, as far as its time depends on it: its kind and its shapes."""


@dataclass(frozen=True, slots=True)
class Samples:
    """Repeated measurements of one thing, in seconds."""

    seconds: tuple[float, ...]

    def quantile(self, share: float) -> float:
        """The value that `share` of the samples do not exceed, interpolated."""
        ordered = sorted(self.seconds)
        position = share * (len(ordered) - 1)
        below = int(position)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (position - below) * (ordered[above] - ordered[below])


@dataclass(frozen=True, slots=True)
class Timing:
    """One row of a profile.

    Attributes:
        operator: key of the operator that was timed.
        partner: key of the operator that ran beside it, None when it ran alone.
        median: seconds from this operator's own start to its end.
        p20: seconds that a fifth of the samples do not exceed.
        p80: seconds that four fifths of the samples do not exceed.
        lead: seconds that the compute operator of the two had run when the communication was
            started; 0 when communication went first.
    """

    operator: Key
    partner: Key | None
    median: float
    p20: float
    p80: float
    lead: float = 0.0

    @classmethod
    def of(cls, operator: Key, partner: Key | None, samples: Samples, lead: float = 0.0) -> Timing:
        """Summarise samples. Refuses none at all, and times that are not positive."""
        beside = f" beside '{partner}'" if partner else ""
        if not samples.seconds:
            raise ValueError(f"'{operator}'{beside} has no samples: measure it at least once")
        if not all(0 < value < float("inf") for value in samples.seconds):
            raise ValueError(
                f"'{operator}'{beside} was timed at {min(samples.seconds)} s: times must be"
                " positive and finite; check the clock of the measurement"
            )
        spread = samples.quantile(0.2), samples.quantile(0.8)
        return cls(operator, partner, median(samples.seconds), *spread, lead)


@dataclass(frozen=True)
class Clock:
    """How operators slow down as compute fills more of the time.

    A device at its power limit lowers its clock: the less compute pauses, the slower it is. Its
    slowdown is a power of the share of time in which it works, and never below 1. A lower clock
    also slows down processors that move the bytes of a collective.

    Attributes:
        full: slowdown of compute that never pauses.
        exponent: of the share.
        communication: slowdown of communication where compute never pauses.
    """

    full: float = 1.0
    exponent: float = 0.5
    communication: float = 1.0

    @classmethod
    def through(cls, full: float, paused: tuple[float, float], communication: float = 1.0) -> Clock:
        """From the slowdown without pauses, and a share of time with its slowdown.

        `communication` is its own slowdown where compute does not pause.
        """
        share, slowdown = paused
        if full <= 1.0 or not 0 < share < 1:
            return cls()
        exponent = log(full / max(slowdown, 1.0)) / log(1 / share)
        return cls(full, max(exponent, 0.0), max(communication, 1.0))

    def slowdown(self, share: float) -> float:
        """Of compute that works for `share` of the time."""
        return float(max(1.0, self.full * min(share, 1.0) ** self.exponent))

    def slowdown_of_communication(self, share: float) -> float:
        """Where compute works for `share` of the time: between none and all as for compute."""
        if self.full <= 1.0:
            return 1.0
        return 1 + (self.communication - 1) * (self.slowdown(share) - 1) / (self.full - 1)


@dataclass(frozen=True)
class Fingerprint:
    """What a profile is valid for.

    Attributes:
        device: its name.
        versions: of the libraries that run operators, by package.
        sizes: `world`, `tp`, `dp` and the like.
        shapes: of the model and a micro-batch: `hidden`, `sequence`, `tokens` and the like.
        dtype: of activations.
        graphs: names of the profiled graphs by their fingerprints.
        kernels: backends of the operators, by operator.
    """

    device: str
    versions: Mapping[str, str]
    sizes: Mapping[str, int]
    shapes: Mapping[str, int]
    dtype: str
    graphs: Mapping[str, str]
    kernels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Profile:
    """Times of the operators of some graphs.

    Attributes:
        fingerprint: what it is valid for.
        operators: key of each operator, by graph fingerprint and operator name.
        lanes: of each key.
        timings: alone and beside one another.
        launch: seconds the host needs to issue one operator.
        graphs: that were profiled, of every kind of layer the forward and the backward one.
        inline: compute ran on the host, as it does on CPU; see `cost.Costs`.
        spares: the key of each operator that was measured leaving processors to communication as
            well, and the key of those times.
        clock: of the device, when it computes for long.
    """

    fingerprint: Fingerprint
    operators: Mapping[str, Mapping[str, Key]]
    lanes: Mapping[Key, Lane]
    timings: tuple[Timing, ...]
    launch: float = 0.0
    graphs: tuple[Graph, ...] = ()
    inline: bool = False
    spares: Mapping[Key, Key] = field(default_factory=dict)
    clock: Clock = field(default_factory=Clock)

    def save(self, path: Path | str) -> None:
        """Write it, whole or not at all."""
        fields = {
            "format": FORMAT,
            "fingerprint": asdict(self.fingerprint),
            "launch": self.launch,
            "inline": self.inline,
            "clock": asdict(self.clock),
            "spares": dict(self.spares),
            "operators": {name: dict(keys) for name, keys in self.operators.items()},
            "lanes": dict(self.lanes),
            "timings": [asdict(row) for row in self.timings],
            "graphs": [fields_of(graph) for graph in self.graphs],
        }
        save_text(Path(path), put_in_lines(fields, flat=("timings", "graphs")))

    @classmethod
    def load(cls, path: Path | str, expected: Fingerprint | None = None) -> Profile:
        """Read a profile that was measured under the conditions of `expected`.

        Raises:
            FileError: the file is not a whole profile, or another one; every differing field is
                named with both values.
        """
        fields = load_json(Path(path), "profile", FORMAT)
        try:
            profile = cls(
                Fingerprint(**fields["fingerprint"]),
                fields["operators"],
                {key: Lane(lane) for key, lane in fields["lanes"].items()},
                tuple(Timing(**row) for row in fields["timings"]),
                float(fields["launch"]),
                tuple(graph_from(row) for row in fields["graphs"]),
                bool(fields["inline"]),
                fields.get("spares", {}),
                Clock(**fields.get("clock", {})),
            )
            profile._check()
        except (KeyError, TypeError, ValueError, AttributeError, AssertionError) as error:
            raise FileError(f"{path} is not a whole profile ({error}): measure again") from error
        if expected is not None:
            found = differences(asdict(profile.fingerprint), asdict(expected))
            if found:
                raise FileError(
                    f"{path} was measured under other conditions: {'; '.join(found)}."
                    " Delete it to measure again"
                )
        return profile

    def _check(self) -> None:
        """Every operator has a time of its own."""
        alone = {row.operator for row in self.timings if row.partner is None}
        needed = {key for keys in self.operators.values() for key in keys.values()}
        missing = needed - (alone & set(self.lanes))
        if missing:
            raise ValueError(f"no time of '{min(missing)}'")
        for graph in self.graphs:
            if graph.fingerprint not in self.operators:
                raise ValueError(f"graph '{graph}' is not the one that was measured")


@dataclass(frozen=True)
class Target:
    """An operator to measure, which stands for all that do the same work.

    Attributes:
        key: its name.
        graph: that it is part of.
        operator: what runs.
        spare: whether it leaves processors to communication.
    """

    key: Key
    graph: Graph
    operator: Operator
    spare: bool = False


class Bench(Protocol):
    """Runs operators on the device and times them.

    Times are of this rank or maximised over ranks, in seconds.

    Attributes:
        lead: the least head start that `behind` can give; 0 where communication cannot be started
            under computation, as on a CPU, where computation holds up the host.
    """

    lead: float

    def shrinks(self, target: Target) -> bool:
        """Whether it can leave processors to communication, and still computes the same bits."""

    def alone(self, target: Target) -> Samples:
        """Time one operator while nothing else runs."""

    def beside(self, communication: Target, compute: Target) -> tuple[Samples, Samples]:
        """Start both, communication first, and time each from the start to its own end."""

    def behind(
        self, communication: Target, compute: Target, lead: float
    ) -> tuple[Samples, Samples]:
        """Start communication `lead` after computation, and time each from its own start."""


class BenchError(RuntimeError):
    """An operator could not be measured. The message names it."""


Progress = Callable[[int, int, str], None]
"""Called with measurements done, all measurements, and what comes next."""


def nominal_identity(graph: Graph, operator: Operator) -> Hashable:
    """Lane, nominal cost and sizes of what is read and written: the same for equal operators."""
    if not operator.cost:
        return graph.fingerprint, operator.name
    sizes = tuple(graph.bytes_per_token.get(slot) for slot in operator.writes)
    return operator.lane, operator.cost, len(operator.reads), sizes, bool(operator.accumulates)


def targets(
    graphs: Iterable[Graph], identity: Identity = nominal_identity
) -> tuple[list[Target], dict[str, dict[str, Key]]]:
    """What to measure, and the key of each operator by graph fingerprint and operator name."""
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
    visits: int = 1,
) -> Profile:
    """Measure every operator of `graphs` alone, and communication beside computation.

    Args:
        bench: times operators.
        graphs: of every kind of layer, the most frequent first: operators that do the same work
            are called by the first of them.
        fingerprint: of the conditions.
        progress: is told what is measured next.
        identity: operators with equal ones are measured once.
        launch: seconds the host needs to issue one operator.
        inline: compute runs on the host, as it does on CPU.
        beside: whether a communication and a compute operator are worth measuring together;
            those that are not keep their speed. All by default.
        visits: how often to go through all measurements. What disturbs the machine for a while
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
    pairs = [
        (communication, compute)
        for communication in chosen
        for compute in chosen
        if communication.operator.is_communication and not compute.operator.is_communication
        if beside is None or beside(communication, compute)
    ]
    work = [_Measurement(target) for target in chosen]
    for behind in (False, True) if bench.lead else (False,):
        work += [_Measurement(*pair, behind) for pair in pairs]
    alone: dict[Key, float] = {}
    count = visits * len(work)
    for number in range(count):
        one = work[number % len(work)]
        if progress is not None:
            progress(number, count, str(one))
        if one.partner is not None and one.behind:
            one.lead = max(bench.lead, _WITHIN * alone[one.partner.key])
        if one.partner is None or alone[one.partner.key] >= _LEADS * one.lead:
            one.visit(bench)
            alone.setdefault(one.target.key, one.visits[0][0].quantile(0.5))
    if progress is not None:
        progress(count, count, "done")
    rows = [row for one in work for row in one.rows()]
    lanes = {target.key: target.operator.lane for target in chosen}
    distinct = tuple({graph.fingerprint: graph for graph in graphs}.values())
    spares = {key: target.key for key, target in sparing.items()}
    return Profile(fingerprint, keys, lanes, tuple(rows), launch, distinct, inline, spares)


@dataclass
class _Measurement:
    """What is timed, and what each visit gave for each of its operators."""

    target: Target
    partner: Target | None = None
    behind: bool = False
    lead: float = 0.0
    visits: list[tuple[Samples, ...]] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.target.key} beside {self.partner.key}" if self.partner else self.target.key

    def visit(self, bench: Bench) -> None:
        """Time it. Raises BenchError."""
        try:
            if self.partner is None:
                found: tuple[Samples, ...] = (bench.alone(self.target),)
            elif self.behind:
                found = bench.behind(self.target, self.partner, self.lead)
            else:
                found = bench.beside(self.target, self.partner)
        except Exception as error:
            raise BenchError(f"measuring {self} failed: {error}") from error
        self.visits.append(found)

    def rows(self) -> list[Timing]:
        """Of all samples; none if it was never visited. Raises BenchError."""
        if not self.visits:
            return []
        rows = [(self.target.key, self.partner.key if self.partner else None)]
        if self.partner is not None:
            rows.append((self.partner.key, self.target.key))
        samples = [
            Samples(tuple(chain.from_iterable(part.seconds for part in parts)))
            for parts in zip(*self.visits, strict=True)
        ]
        try:
            return [
                Timing.of(*keys, own, self.lead) for keys, own in zip(rows, samples, strict=True)
            ]
        except ValueError as error:
            raise BenchError(f"measuring {self} failed: {error}") from error


def merged(profiles: Sequence[Profile]) -> Profile:
    """One profile from several of the same graphs: of each time the median of what they say.

    Raises:
        ValueError: there are none, or they were not measured under the same conditions.
    """
    if not profiles:
        raise ValueError("there is no profile to merge: measure at least one")
    first = profiles[0]
    found = [
        name
        for other in profiles
        for name in differences(asdict(first.fingerprint), asdict(other.fingerprint))
    ]
    if found:
        raise ValueError(f"profiles of different conditions cannot be merged: {'; '.join(found)}")
    rows: dict[tuple[Key, Key | None, bool], list[Timing]] = {}
    for row in chain(*(profile.timings for profile in profiles)):
        rows.setdefault((row.operator, row.partner, row.lead > 0), []).append(row)
    timings = (
        replace(
            same[0],
            median=median(row.median for row in same),
            p20=median(row.p20 for row in same),
            p80=median(row.p80 for row in same),
            lead=median(row.lead for row in same),
        )
        for same in rows.values()
    )
    return replace(first, timings=tuple(timings))


def perturbed(profile: Profile, draw: Callable[[], float]) -> Profile:
    """A profile that the same measurement could have given: each time drawn from its spread.

    `draw` returns numbers from 0 to 1.
    """

    def again(row: Timing) -> Timing:
        value = row.p20 + draw() * (row.p80 - row.p20)
        return replace(row, median=value)

    return replace(profile, timings=tuple(again(row) for row in profile.timings))


def spread(profile: Profile, count: int) -> list[Profile]:
    """Profiles that the same measurement could have given, which together cover its spread.

    Each time is drawn once from every part of its spread, in an order of its own. The same profile
    gives the same ones.
    """
    draw = random.Random(0)
    strata = [draw.sample(range(count), count) for _ in profile.timings]
    return [
        perturbed(profile, iter([(row[number] + 0.5) / count for row in strata]).__next__)
        for number in range(count)
    ]
