"""What the operators of a rank cost on a cluster: from a profile as far as it tells, or derived.

An operator's time comes from the best source that there is, and its bars from how good that is:

    measured   the profile has this operator on this device, at this size
    scaled     it has the operator at another size, or a link between as many ranks: by work, less
               sure where it is for collectives of another kind
    derived    it has not, or was measured on another device or in other numbers, also of 8 bits: by
               data sheets
    modelled   communication, by bytes and the level of the network (see `collectives`)

How operators disturb each other is not taken from the profile of another device, whose links are
others; that its rates fall under load, as its limit of power has it, is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

from lightning_dhellam.parallel.networks import Device, Network, Networks, Reach
from lightning_dhellam.parallel.topology import Topology
from lightning_dhellam.plan import Collective, Graph, Lane, Operator, nominal
from lightning_dhellam.search.cluster.collectives import seconds_of
from lightning_dhellam.search.measure import Key, Profile, mean_of
from lightning_dhellam.search.model import Costs, Sample
from lightning_dhellam.search.model.slowdowns import Slowdowns

EMULATED = ", emulated cluster"
"""What the name of a device goes on with in a profile whose links are emulated."""
_LEAST = 4e-6
"""Seconds that a kernel takes at least."""
_MATRIX, _FORWARD, _BACKWARD, _MEMORY = 0.65, 0.58, 0.49, 0.83
"""Shares of a data sheet's rates that an H200 reaches for long: of matrix products, attention
forward and backward, and memory."""
REAL = 1.035
"""How much longer real steps on GPUs are than operators alone let expect: the mean of those that
were measured on two H200 (benchmarks/multi_gpu, 2026-11-25)."""
_MODELLED_SLOWDOWN = 1.1
"""Of a collective whose kernels share a device with computation, where it was not measured."""
_SAME = 1e-6
_RINGS = {None, Collective.ALL_GATHER, Collective.REDUCE_SCATTER, Collective.ALL_REDUCE}
"""Collectives that pass parts around a ring, so that the rate of one tells of all."""


class Origin(StrEnum):
    """Where a time comes from."""

    MEASURED = "measured"
    SCALED = "scaled"
    DERIVED = "derived"
    MODELLED = "modelled"


BARS: Mapping[Origin, float] = {
    Origin.SCALED: 0.07,
    Origin.DERIVED: 0.15,
}
"""Share by which a time may be wrong either way. Of what is measured the spread says it, and of
what is modelled its network does (`Network.error`)."""


@dataclass(frozen=True)
class Machine:
    """What a rank runs on.

    Attributes:
        device: by its data sheet.
        networks: between ranks.
        slower: times that lanes are slower than their networks say.
        straggler: times that compute is slower than it should be.
        in_fp32: whether it computes in fp32, or else in numbers of two bytes.
    """

    device: Device
    networks: Networks
    slower: Mapping[Lane, float] = field(default_factory=dict)
    straggler: float = 1.0
    in_fp32: bool = False

    def reach(self, lane: Lane, topology: Topology) -> Reach:
        """The group of a lane. That of `dp` adds up gradients, also of ranks that share
        sequences."""
        size, step = topology.size(lane), topology.step(lane)
        if lane is Lane.DP:
            size, step = topology.replicas, topology.tp_size
        return self.networks.slower(self.slower.get(lane, 1.0)).of(size, step)

    def host(self, lane: Lane) -> Network:
        """What is between a device and the memory of its host, one way.

        Raises:
            ValueError: nothing says it.
        """
        if self.networks.host is None:
            raise ValueError(
                f"how fast {self.device.name} copies to the memory of its host is not known: add"
                " `host` with its bandwidth under `networks` in the cluster file, or leave offload"
                " out"
            )
        return self.networks.host.taking(self.slower.get(lane, 1.0))

    def flops(self) -> float:
        """Operations per second that its device could compute in its numbers at most.

        Raises:
            ValueError: nothing says it.
        """
        if not self.in_fp32:
            return self.device.flops
        if self.device.flops_fp32 is None:
            raise ValueError(
                f"how fast {self.device.name} computes in fp32 is not known: add `flops_fp32` under"
                " `device` in the cluster file, or train in bf16"
            )
        return self.device.flops_fp32

    def eight_bits(self, fp8: str) -> float:
        """How much faster its products are in a format of 8 bits, beside those of an H200.

        Nominal costs have what an H200 gains, whose sheet has twice the rate of 16 bits.

        Raises:
            ValueError: nothing says it.
        """
        if not fp8:
            return 1.0
        if self.device.flops_fp8 is None:
            raise ValueError(
                f"how fast {self.device.name} computes in 8 bits is not known: add `flops_fp8`"
                " under `device` in the cluster file, or leave fp8 out"
            )
        return self.device.flops_fp8 / (2 * self.device.flops)

    def wrong(self, sign: int) -> Machine:
        """The same if its networks and its memory are slower (1), or faster (-1), by as much as
        they may be."""
        memory = self.device.bandwidth / (1 + sign * BARS[Origin.DERIVED])
        device = replace(self.device, bandwidth=memory)
        return replace(self, device=device, networks=self.networks.wrong(sign))


class Price(NamedTuple):
    """Seconds of an operator alone, and within which it may lie."""

    seconds: float
    low: float
    high: float
    origin: Origin


@dataclass(frozen=True)
class Priced:
    """Operators of some graphs with what they cost.

    Attributes:
        costs: what the machine model needs to know of them.
        prices: by key.
    """

    costs: Costs
    prices: Mapping[Key, Price]

    def at(self, wrong: int) -> Costs:
        """Costs if all that is uncertain turns out badly (1), well (-1), or as expected (0)."""
        if not wrong:
            return self.costs
        ends = {k: p.high if wrong > 0 else p.low for k, p in self.prices.items()}
        return replace(self.costs, seconds=ends)


class Known:
    """What a profile tells of operators by their names.

    Args:
        profile: of one rank.
        devices: data sheets of devices by their names, to tell one from another by.
    """

    def __init__(self, profile: Profile, devices: Mapping[str, Device]) -> None:
        made_for = profile.fingerprint
        self.profile = profile
        self.device, _, links = made_for.device.partition(EMULATED)
        self.is_emulated = bool(links)
        self.sheet = devices.get(self.device)
        self.in_fp32 = made_for.dtype == "float32"
        shapes, sizes = made_for.shapes, made_for.sizes
        self.tokens = shapes["micro_batch_size"] * shapes["sequence_length"] / sizes.get("cp", 1)
        self.rows = {row.operator: row for row in profile.timings if row.partner is None}
        measured = Sample.of(profile)
        self.costs = Costs(
            profile.operators,
            {**measured.seconds, **mean_of(profile)},
            measured.slowdowns,
            profile.launch,
            profile.inline,
            measured.behind,
            clock=profile.clock,
        )
        self._by_name: dict[str, tuple[Graph, Operator]] = {}
        for graph in profile.graphs:
            for operator in graph.operators:
                self._by_name.setdefault(operator.name, (graph, operator))

    def is_of(self, machine: Machine) -> bool:
        """Whether it was measured on such devices."""
        return self.device == machine.device.name

    def find(self, name: str) -> tuple[Graph, Operator] | None:
        """The operator of that name, or the one that it is run again of."""
        return self._by_name.get(name) or self._by_name.get(name.removesuffix(".again"))

    def key(self, found: tuple[Graph, Operator]) -> Key:
        """Key of an operator that was found."""
        return self.profile.operators[found[0].fingerprint][found[1].name]

    def rate(self, ranks: int) -> float | None:
        """Bytes per second over real links between so many ranks, of the largest gather."""
        if self.is_emulated:
            return None
        return self._rate(
            nominal.LINK,
            lambda lane: (
                lane in (Lane.TP, Lane.CP) and self.profile.fingerprint.sizes.get(lane) == ranks
            ),
        )

    def host_rate(self, lane: Lane) -> float | None:
        """Bytes per second to the memory of the host, or back, of the largest copy."""
        return self._rate(nominal.HOST_LINK, lambda other: other is lane)

    def _rate(self, link: float, counts: Callable[[Lane], bool]) -> float | None:
        rates = [
            (operator.cost, operator.cost * self.tokens * link / self._seconds(graph, name))
            for name, (graph, operator) in self._by_name.items()
            if counts(operator.lane)
        ]
        return max(rates)[1] if rates else None

    def _seconds(self, graph: Graph, name: str) -> float:
        return self.costs.seconds[self.profile.operators[graph.fingerprint][name]]


@dataclass(frozen=True)
class Pricing:
    """Prices operators on a machine.

    Attributes:
        machine: what they run on.
        topology: of the run.
        tokens: of a micro-batch on a rank.
        known: what a profile tells; None without one.
    """

    machine: Machine
    topology: Topology
    tokens: int
    known: Known | None = None

    def price(self, graphs: Iterable[Graph]) -> Priced:
        """Price every operator of some graphs."""
        keys: dict[str, dict[str, Key]] = {}
        prices: dict[Key, Price] = {}
        lanes: dict[Key, Lane] = {}
        measured: dict[Key, Key] = {}
        for graph in {graph.fingerprint: graph for graph in graphs}.values():
            own = keys.setdefault(graph.fingerprint, {})
            for operator in graph.operators:
                key = own[operator.name] = f"{graph}/{operator.name}"
                prices[key] = self._slowed(self._price(graph, operator), operator.lane)
                lanes[key] = operator.lane
                found = self.known.find(operator.name) if self.known else None
                if self.known and found:
                    measured[key] = self.known.key(found)
        costs = Costs(keys, {key: price.seconds for key, price in prices.items()})
        base = self.known.costs if self.known else costs
        alike = base if self.known and self.known.is_of(self.machine) else costs
        costs = replace(
            costs,
            slowdowns=self._slowdowns(lanes, measured, alike.slowdowns),
            behind=self._known_slowdowns(lanes, measured, alike.behind),
            launch=base.launch,
            inline=base.inline,
            clock=base.clock,
            compute=frozenset(key for key, lane in lanes.items() if lane is Lane.COMPUTE),
        )
        return Priced(costs, prices)

    def _slowed(self, price: Price, lane: Lane) -> Price:
        times = 1.0 if self.known and self.known.profile.inline else REAL
        if lane is Lane.COMPUTE:
            times *= self.machine.straggler
        return Price(price.seconds * times, price.low * times, price.high * times, price.origin)

    def _price(self, graph: Graph, operator: Operator) -> Price:
        if operator.lane is Lane.HOST:
            return _around(_LEAST, Origin.DERIVED)
        if operator.is_communication:
            return self._communication(graph, operator)
        if operator.lane.copies:
            return self._copy(operator)
        derived = self._derived(graph, operator, self.machine, operator.fp8)
        known = self.known
        found = known.find(operator.name) if known else None
        if known is None or found is None:
            return _around(derived, Origin.DERIVED)
        row, other = known.rows[known.key(found)], found[1]
        ratio = self._ratio(operator, other)
        same = abs(ratio - 1) < _SAME and self._alike(graph, operator, found)
        seconds = known.costs.seconds[row.operator]
        alike = known.is_of(self.machine) and known.in_fp32 is self.machine.in_fp32
        if not alike or operator.fp8 != other.fp8:
            sheet = self.machine.device if alike else known.sheet
            if sheet is None:
                return _around(derived, Origin.DERIVED)
            theirs = replace(self.machine, device=sheet, in_fp32=known.in_fp32)
            times = derived / self._derived(graph, operator, theirs, other.fp8)
            return _around(seconds * ratio * times, Origin.DERIVED)
        if same:
            low, high = row.p20 / row.median, row.p80 / row.median
            return Price(seconds, seconds * low, seconds * high, Origin.MEASURED)
        return _around(seconds * ratio, Origin.SCALED)

    def _communication(self, graph: Graph, operator: Operator) -> Price:
        reach = self.machine.reach(operator.lane, self.topology)
        crossing = operator.cost * nominal.LINK * self.tokens
        modelled = seconds_of(operator.collective, crossing, reach)
        known = self.known
        usable = (
            known is not None
            and not known.is_emulated
            and known.is_of(self.machine)
            and reach.nodes == 1
            and self.machine.slower.get(operator.lane, 1.0) == 1.0
        )
        error = reach.network.error if reach.size > 1 else 0.0
        if not usable or known is None:
            return _around(modelled, Origin.MODELLED, error)
        found = known.find(operator.name)
        size = known.profile.fingerprint.sizes.get(operator.lane.value)
        if found and found[1].lane is operator.lane and size == reach.size:
            return self._measured(operator, found)
        rate = known.rate(reach.size)
        if rate is None:
            return _around(modelled, Origin.MODELLED, error)
        # By the rate of a gather an all-to-all was 10% off.
        bar = BARS[Origin.SCALED if operator.collective in _RINGS else Origin.DERIVED]
        return _around(reach.network.latency + crossing / rate, Origin.SCALED, bar)

    def _copy(self, operator: Operator) -> Price:
        """To the memory of the host, or back: as measured, or by the bytes and the link."""
        known, crossing = self.known, operator.cost * nominal.HOST_LINK * self.tokens
        usual = self.machine.slower.get(operator.lane, 1.0) == 1.0
        if known is not None and known.is_of(self.machine) and usual:
            found = known.find(operator.name)
            if found and found[1].lane is operator.lane:
                return self._measured(operator, found)
            rate = known.host_rate(operator.lane)
            if rate is not None:
                return _around(crossing / rate, Origin.SCALED)
        host = self.machine.host(operator.lane)
        return _around(host.latency + crossing / host.bandwidth, Origin.MODELLED, host.error)

    def _measured(self, operator: Operator, found: tuple[Graph, Operator]) -> Price:
        """What a profile has of the same on the same link, at this size or another."""
        assert self.known is not None
        ratio, row = self._ratio(operator, found[1]), self.known.rows[self.known.key(found)]
        seconds = self.known.costs.seconds[row.operator]
        if abs(ratio - 1) < _SAME:
            low, high = row.p20 / row.median, row.p80 / row.median
            return Price(seconds, seconds * low, seconds * high, Origin.MEASURED)
        return _around(seconds * ratio, Origin.SCALED)

    def _ratio(self, operator: Operator, other: Operator) -> float:
        """How much more work an operator has than the one that was measured."""
        assert self.known is not None
        if not other.cost:
            return 1.0 * self.tokens / self.known.tokens
        return operator.cost * self.tokens / (other.cost * self.known.tokens)

    def _alike(self, graph: Graph, operator: Operator, found: tuple[Graph, Operator]) -> bool:
        """Whether what it writes is as large: the same work may be of another shape."""
        assert self.known is not None
        own = sum(graph.bytes_per_token.get(slot, 0.0) for slot in operator.writes)
        theirs = sum(found[0].bytes_per_token.get(slot, 0.0) for slot in found[1].writes)
        return abs(own * self.tokens - theirs * self.known.tokens) <= _SAME * own * self.tokens

    def _derived(self, graph: Graph, operator: Operator, machine: Machine, fp8: str) -> float:
        """Seconds by data sheets, on a machine that computes it in such 8 bits, or in none."""
        if operator.light or not operator.cost:
            moved = operator.cost * nominal.MEMORY * self.tokens
            return max(_LEAST, moved / (_MEMORY * machine.device.bandwidth))
        share = _MATRIX
        if operator.growth or operator.name.split(".")[0] == "attention":
            share = _BACKWARD if graph.direction == "backward" else _FORWARD
        flops = operator.cost * nominal.FLOPS * self.tokens
        return max(_LEAST, flops / (share * machine.flops() * machine.eight_bits(fp8)))

    def _slowdowns(
        self, lanes: Mapping[Key, Lane], measured: Mapping[Key, Key], base: Slowdowns
    ) -> Slowdowns:
        """How operators disturb each other: as measured, or by the processors of a transfer."""
        found = {}
        for one, lane in lanes.items():
            if not lane.moves:
                continue
            # What goes to the host and back is carried by copy engines.
            sms = 0 if lane.copies else self.machine.reach(lane, self.topology).network.sms
            left = 1 - sms / self.machine.device.multiprocessors
            usual = (_MODELLED_SLOWDOWN if sms else 1.0), 1 / max(left, 0.1)
            for other, its in lanes.items():
                if its is Lane.COMPUTE:
                    found[one, other] = usual
        return {**found, **self._known_slowdowns(lanes, measured, base)}

    def _known_slowdowns(
        self, lanes: Mapping[Key, Lane], measured: Mapping[Key, Key], base: Slowdowns
    ) -> Slowdowns:
        talking = [key for key in measured if lanes[key].moves]
        pairs: Sequence[tuple[Key, Key]] = [(a, b) for a in talking for b in measured if a != b]
        return {
            (a, b): base[measured[a], measured[b]]
            for a, b in pairs
            if (measured[a], measured[b]) in base
        }


def _around(seconds: float, origin: Origin, bar: float | None = None) -> Price:
    bar = BARS[origin] if bar is None else bar
    return Price(seconds, seconds * (1 - bar), seconds * (1 + bar), origin)
