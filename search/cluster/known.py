"""What a profile tells of operators by their names."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from lightning_dhellam.parallel.networks import Device
from lightning_dhellam.plan import Graph, Lane, Operator, nominal
from lightning_dhellam.search.cluster.machine import Machine
from lightning_dhellam.search.measure import Key, Profile, mean_of
from lightning_dhellam.search.model import Costs, Sample

EMULATED = ", emulated cluster"
"""What the name of a device goes on with in a profile whose links are emulated."""


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
