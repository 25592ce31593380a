"""What a cluster is built of: its devices, and the networks between them by level.

Groups of ranks that communicate lie inside of a node, or reach over several. Which of the two
networks a group uses, and with how many others it shares it, follows from its size and from how far
apart its ranks are:

    inside    each device sends, and receives, at its bandwidth
    between   each adapter of a node does, and all of its devices share the adapters evenly
    host      each device does to the memory of its host, and back

The ring of a group enters and leaves each node once, on each adapter that it has. So where a node
of 8 devices and 4 adapters holds 2 ranks of a group, as many groups as that leaves share what the
node sends: each has one adapter, and a rank alone on its node half of one.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from lightning_dhellam.values import check_fields


@dataclass(frozen=True)
class Device:
    """A device, by its data sheet.

    Attributes:
        name: as CUDA calls it, such as `NVIDIA H200`.
        flops: dense bf16 or fp16 operations per second that it could compute at most.
        memory: bytes of its memory that CUDA reports, which are not those of its name: of an H200
            6% more, of a device with error correction less.
        bandwidth: bytes per second of its memory.
        multiprocessors: how many it has.
        flops_fp32: the same as `flops` of fp32 without TF32; None where nothing says it.
        flops_fp8: the same of 8 bits; None where it has none, or nothing says it.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    multiprocessors: int
    flops_fp32: float | None = None
    flops_fp8: float | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "name" and value is not None:
                _check_positive(field.name, value)


@dataclass(frozen=True)
class Network:
    """One level of networks.

    Attributes:
        bandwidth: bytes per second that are sent, and received, at once: inside of a node by a
            device, between nodes by an adapter.
        latency: seconds before the first byte.
        hop: seconds that each further step of a ring or a tree takes.
        sms: streaming multiprocessors that a transfer keeps busy; 0 for the copy engine.
        error: share by which its times may be wrong either way: what was measured of it, or what is
            assumed of a network that was not.
    """

    bandwidth: float
    latency: float = 10e-6
    hop: float = 0.0
    sms: int = 0
    error: float = 0.2

    def __post_init__(self) -> None:
        check_fields(self)
        _check_positive("bandwidth", self.bandwidth)
        for name in ("latency", "hop", "sms"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0")
        if not 0 <= self.error < 1:
            raise ValueError(f"error={self.error} must be at least 0 and less than 1, such as 0.2")

    def taking(self, times: float) -> Network:
        """The same where all takes so many times as long."""
        return replace(
            self,
            bandwidth=self.bandwidth / times,
            latency=self.latency * times,
            hop=self.hop * times,
        )


@dataclass(frozen=True)
class Networks:
    """All levels.

    Attributes:
        node: devices of a node.
        inside: the network inside of a node.
        between: the network between nodes; None where there is one node.
        adapters: of a node to the network between nodes.
        host: between a device and the memory of its host; None where nothing says it.
    """

    node: int
    inside: Network
    between: Network | None = None
    adapters: int = 1
    host: Network | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        _check_positive("node", self.node)
        _check_positive("adapters", self.adapters)

    def of(self, size: int, step: int) -> Reach:
        """How far a group reaches of `size` ranks, `step` apart from each other."""
        inside = max(1, min(size, self.node // step))
        return Reach(self, size, inside)

    def slower(self, times: float) -> Networks:
        """The same with a fraction of the bandwidths."""
        if times == 1.0:
            return self
        inside = _slower(self.inside, times)
        return replace(self, inside=inside, between=self.between and _slower(self.between, times))

    def wrong(self, sign: int) -> Networks:
        """The same if all its times are wrong by their error: longer for 1, shorter for -1."""
        inside, between, host = (
            one and one.taking(1 + sign * one.error)
            for one in (self.inside, self.between, self.host)
        )
        assert inside is not None
        return replace(self, inside=inside, between=between, host=host)


@dataclass(frozen=True)
class Reach:
    """A group of ranks, and what connects them.

    Attributes:
        networks: of the cluster.
        size: ranks of the group.
        inside: as many of them as lie in a node.
    """

    networks: Networks
    size: int
    inside: int

    @property
    def nodes(self) -> int:
        """Over how many nodes the group reaches."""
        return -(-self.size // self.inside)

    @property
    def name(self) -> str:
        """The level: `inside` or `between`."""
        return "inside" if self.nodes == 1 else "between"

    @property
    def network(self) -> Network:
        """The slowest network that the group uses.

        Raises:
            ValueError: it would reach over nodes, between which there is no network.
        """
        if self.nodes == 1:
            return self.networks.inside
        if self.networks.between is None:
            raise ValueError(
                f"{self.size} ranks, of which a node of {self.networks.node} holds {self.inside},"
                " need a network between nodes: add `between` under `networks`"
            )
        return self.networks.between

    @property
    def ring(self) -> float:
        """Bytes per second that pass each rank of a ring through the group."""
        slowest = self.network.bandwidth
        if self.nodes == 1:
            return slowest
        shared = slowest * self.networks.adapters * self.inside / self.networks.node
        return min(shared, self.networks.inside.bandwidth) if self.inside > 1 else shared

    @property
    def straight(self) -> float:
        """Bytes per second that a rank sends to others where each sends to each."""
        if self.nodes == 1:
            return self.network.bandwidth
        own = self.network.bandwidth * self.networks.adapters / self.networks.node
        outside = (self.size - self.inside) / own
        within = (self.inside - 1) / self.networks.inside.bandwidth
        return (self.size - 1) / max(outside, within)


def _slower(network: Network, times: float) -> Network:
    return replace(network, bandwidth=network.bandwidth / times)


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}={value} must be more than 0")
