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

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from lightning_dhellam.parallel.topology import Topology
from lightning_dhellam.plan import Collective, Graph, Lane, Operator, nominal
from lightning_dhellam.search.cluster.collectives import seconds_of
from lightning_dhellam.search.cluster.known import Known
from lightning_dhellam.search.cluster.machine import BARS, Machine, Origin
from lightning_dhellam.search.measure import Key
from lightning_dhellam.search.model import Costs
from lightning_dhellam.search.model.slowdowns import Slowdowns

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
