"""One process as a rank of a cluster: real shards, real kernels, links emulated in time.

Megatron-core builds this rank's real shards of a model of any world size, in process groups of
which there is no other process (`stand_in.py`). A link (`link.EmulatedLink`) then occupies the
communication lane for the time that the transfer would take. Numbers computed this way mean
nothing; times do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from lightning_dhellam.parallel import stand_in
from lightning_dhellam.parallel.networks import Device, Network, Networks, Reach
from lightning_dhellam.parallel.topology import LANES, Topology
from lightning_dhellam.plan import Collective, Lane
from lightning_dhellam.recipes import clusters
from lightning_dhellam.values import check_fields, load_yaml

_NEEDED = ("world_size", "links")


@dataclass(frozen=True, repr=False)
class Link:
    """What connects this rank to the others of one lane.

    Attributes:
        bandwidth: bytes per second that this rank sends, and receives, at once.
        latency: seconds before the first byte.
        sms: streaming multiprocessors that the transfer keeps busy; 0 for the copy engine.
        collectives: what it is for some collectives, where they differ from the others.
    """

    bandwidth: float
    latency: float = 10e-6
    sms: int = 0
    collectives: tuple[tuple[Collective, Link], ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth={self.bandwidth} must be more than 0 bytes per second")
        if not self.latency >= 0:
            raise ValueError(f"latency={self.latency} must be at least 0 seconds")
        if self.sms < 0:
            raise ValueError(f"sms={self.sms} must be at least 0; 0 is the copy engine")

    def __str__(self) -> str:
        manner = f"on {self.sms} SMs" if self.sms else "by copy engine"
        others = "".join(f", {collective} {link}" for collective, link in self.collectives)
        return f"{self.bandwidth / 1e9:.4g} GB/s {manner}{others}"

    def __repr__(self) -> str:
        given = f"bandwidth={self.bandwidth}, latency={self.latency}, sms={self.sms}"
        others = f", collectives={self.collectives}" if self.collectives else ""
        return f"Link({given}{others})"

    def of(self, collective: Collective) -> Link:
        """What it is for such a collective."""
        return next((link for other, link in self.collectives if other is collective), self)

    def slower(self, times: float) -> Link:
        """The same with a fraction of the bandwidth."""
        others = tuple((collective, link.slower(times)) for collective, link in self.collectives)
        return replace(self, bandwidth=self.bandwidth / times, collectives=others)

    def seconds(self, crossing: int) -> float:
        """How long `crossing` bytes take."""
        return self.latency + crossing / self.bandwidth


@dataclass(frozen=True)
class Cluster:
    """The cluster that a run pretends to be part of, or is predicted for.

    Attributes:
        world_size: ranks.
        links: by lane: `tp`, `pp`, `cp`, `ep`, `dp`. On other lanes transfers take no time. Where
            there are `networks`, those that are not given follow from them; see `links_of`.
        rank: which of them this process is.
        source: where the figures come from.
        name: what the user calls it: of a shipped file, or the path of another one.
        device: what each rank computes on; None where nothing is said of it.
        networks: what connects the ranks, by level; None where links say it by lane.
    """

    world_size: int
    links: Mapping[str, Link]
    rank: int = 0
    source: str = ""
    name: str = "cluster"
    device: Device | None = None
    networks: Networks | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank} must be below world_size={self.world_size}")
        unknown = sorted(set(self.links) - set(LANES))
        if unknown:
            raise ValueError(f"links: '{unknown[0]}' is not one of {', '.join(LANES)}")

    def __str__(self) -> str:
        links = ", ".join(f"{name} {link}" for name, link in self.links.items())
        return f"{self.name}: rank {self.rank} of {self.world_size}, {links or 'no links'}"

    @classmethod
    def load(cls, path: str | Path, option: str = "emulate=") -> Cluster:
        """Read a cluster file, by its path or by the name of one that ships, such as `h200-node`.

        Args:
            path: or the name.
            option: what it was given by, as the user wrote it.

        Raises:
            ValueError: the file is missing, or a field is missing, unknown or out of range.
        """
        name = str(path)
        path = Path(path) if Path(path).suffix else clusters.find(name, option)
        try:
            return _cluster(load_yaml(path), name)
        except ValueError as error:
            raise ValueError(f"cluster file {path}: {error}") from error

    def links_of(self, topology: Topology) -> dict[str, Link]:
        """The link of each lane on which several ranks communicate, and those that are given.

        Raises:
            ValueError: ranks would lie in several nodes, between which there is no network.
        """
        links = dict(self.links)
        if self.networks is None:
            return links
        for lane in LANES:
            size, step = topology.size(lane), topology.step(lane)
            if lane is Lane.DP:  # gradients are added up over ranks that share sequences, too
                size, step = topology.replicas, topology.tp_size
            if lane not in links and size > 1:
                links[lane] = _link_of(self.networks.of(size, step))
        return links

    def join(self) -> None:
        """Initialise torch.distributed as this rank, without any other process."""
        stand_in.join(self.rank, self.world_size)


def _link_of(reach: Reach) -> Link:
    """What connects a rank to others of such a group."""
    network = reach.network
    link = Link(reach.ring, network.latency, network.sms)
    straight = replace(link, bandwidth=reach.straight)
    return replace(link, collectives=((Collective.ALL_TO_ALL, straight),))


def _cluster(given: Any, name: str) -> Cluster:
    needed = ("world_size",) if isinstance(given, dict) and "networks" in given else _NEEDED
    values = {"name": name, "links": {}, **_fields(Cluster, given, "it", needed)}
    links = values["links"]
    if not isinstance(links, dict):
        raise ValueError(f"links={links!r} must be a mapping from lane to link")
    return Cluster(
        world_size=_whole(values["world_size"], "world_size"),
        links={lane: _link(link, f"links.{lane}") for lane, link in links.items()},
        rank=_whole(values.get("rank", 0), "rank"),
        source=str(values.get("source", "")),
        name=str(values["name"]),
        device=_part(Device, values.get("device"), "device"),
        networks=_networks(values.get("networks")),
    )


def _networks(given: Any) -> Networks | None:
    if given is None:
        return None
    levels = _fields(Networks, given, "networks", ("node", "inside"))
    inside = _part(Network, levels["inside"], "networks.inside")
    if inside is None:
        raise ValueError("networks.inside is blank: give it a bandwidth")
    between, host = (
        _part(Network, levels.get(name), f"networks.{name}") for name in ("between", "host")
    )
    adapters = _whole(levels.get("adapters", 1), "networks.adapters")
    try:
        return Networks(_whole(levels["node"], "networks.node"), inside, between, adapters, host)
    except ValueError as error:
        raise ValueError(f"networks.{error}") from error


def _part(kind: Any, given: Any, place: str) -> Any:
    """A device or a network as a file spells it."""
    if given is None:
        return None
    needed = [field.name for field in fields(kind) if field.default is MISSING]
    values = _fields(kind, given, place, tuple(needed))
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{place}.{error}") from error


def _link(given: Any, place: str, base: Link | None = None) -> Link:
    """A link as a file spells it. What it does not say is as `base` has it."""
    values = _fields(Link, given, place, () if base else ("bandwidth",))
    found: dict[str, Any] = {}
    for name, read in (("bandwidth", _number), ("latency", _number), ("sms", _whole)):
        if name in values:
            found[name] = read(values[name], f"{place}.{name}")
    try:
        link = replace(base, **found) if base else Link(**found)
    except ValueError as error:
        raise ValueError(f"{place}.{error}") from error
    others = values.get("collectives", {})
    if not isinstance(others, dict) or (others and base):
        raise ValueError(
            f"{place}.collectives={others!r} must be a mapping from collective to link"
        )
    unknown = sorted(set(map(str, others)) - set(Collective))
    if unknown:
        raise ValueError(
            f"{place}.collectives: '{unknown[0]}' is not one of {', '.join(Collective)}"
        )
    return replace(
        link,
        collectives=tuple(
            (Collective(name), _link(other, f"{place}.collectives.{name}", link))
            for name, other in others.items()
        ),
    )


def _fields(kind: Any, given: Any, place: str, needed: tuple[str, ...]) -> dict[str, Any]:
    """The fields of a mapping, of which none may be unknown or missing."""
    names = [field.name for field in fields(kind)]
    if not isinstance(given, dict):
        shown = f" with {' and '.join(needed)}" if needed else ""
        raise ValueError(f"{place} must be a mapping{shown}, not {given!r}")
    unknown = sorted(set(map(str, given)) - set(names))
    if unknown:
        raise ValueError(f"unknown field '{unknown[0]}': use {names}")
    missing = [name for name in needed if name not in given]
    if missing:
        raise ValueError(f"{place} has no {missing[0]}: give it one")
    return dict(given)


def _number(value: Any, place: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{place}={value!r} must be a number, such as 370e9")
    return value


def _whole(value: Any, place: str) -> int:
    number = _number(value, place)
    if not math.isfinite(number) or number != int(number):
        raise ValueError(f"{place}={value!r} must be a whole number")
    return int(number)
