"""One process as a rank of a cluster: real shards, real kernels, links emulated in time.

With torch's `fake` process group Megatron-core builds this rank's real shards of a model of any
world size, and collectives do nothing. A link (`link.EmulatedLink`) then occupies the
communication lane for the time that the transfer would take. Numbers computed this way mean
nothing; times do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from lightning_dhellam.recipes import clusters

_COMMUNICATORS = ("tp",)


@dataclass(frozen=True)
class Link:
    """What connects this rank to the others of one communicator.

    Attributes:
        bandwidth: bytes per second that this rank sends, and receives, at once.
        latency: seconds before the first byte.
        sms: streaming multiprocessors that the transfer keeps busy; 0 for the copy engine.
    """

    bandwidth: float
    latency: float = 10e-6
    sms: int = 0

    def __post_init__(self) -> None:
        if not self.bandwidth > 0:
            raise ValueError(f"bandwidth={self.bandwidth} must be more than 0 bytes per second")
        if not self.latency >= 0:
            raise ValueError(f"latency={self.latency} must be at least 0 seconds")
        if self.sms < 0:
            raise ValueError(f"sms={self.sms} must be at least 0; 0 is the copy engine")

    def __str__(self) -> str:
        manner = f"on {self.sms} SMs" if self.sms else "by copy engine"
        return f"{self.bandwidth / 1e9:.4g} GB/s {manner}"

    def slower(self, times: float) -> Link:
        """The same with a fraction of the bandwidth."""
        return replace(self, bandwidth=self.bandwidth / times)

    def seconds(self, crossing: int) -> float:
        """How long `crossing` bytes take."""
        return self.latency + crossing / self.bandwidth


@dataclass(frozen=True)
class Cluster:
    """The cluster that a run pretends to be part of.

    Attributes:
        world_size: ranks.
        links: by communicator; `tp`. Links of other communicators take no time.
        rank: which of them this process is.
        source: where the figures come from.
        name: what the user calls it: of a shipped file, or the path of another one.
    """

    world_size: int
    links: Mapping[str, Link]
    rank: int = 0
    source: str = ""
    name: str = "cluster"

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank={self.rank} must be below world_size={self.world_size}")
        unknown = sorted(set(self.links) - set(_COMMUNICATORS))
        if unknown:
            raise ValueError(f"links: '{unknown[0]}' is not one of {', '.join(_COMMUNICATORS)}")

    def __str__(self) -> str:
        links = ", ".join(f"{name} {link}" for name, link in self.links.items())
        return f"{self.name}: rank {self.rank} of {self.world_size}, {links or 'no links'}"

    @classmethod
    def load(cls, path: str | Path) -> Cluster:
        """Read a cluster file, by its path or by the name of one that ships, such as `h200-node`.

        Raises:
            ValueError: the file is missing, or a field is missing, unknown or out of range.
        """
        name = str(path)
        path = Path(path) if Path(path).suffix else clusters.find(name)
        try:
            given = yaml.safe_load(Path(path).read_text())
        except OSError as error:
            raise ValueError(f"cluster file {path}: {error.strerror}") from error
        if not isinstance(given, dict):
            raise ValueError(f"cluster file {path} must be a mapping with world_size and links")
        links = {name: _known(Link, link, path) for name, link in given.pop("links", {}).items()}
        cluster: Cluster = _known(cls, {"name": name, **given, "links": links}, path)
        return cluster

    def join(self) -> None:
        """Initialise torch.distributed as this rank, without any other process."""
        from torch.testing._internal.distributed.fake_pg import FakeStore

        dist.init_process_group(
            "fake", store=FakeStore(), rank=self.rank, world_size=self.world_size
        )


def is_emulated() -> bool:
    """Whether this process has joined a cluster of which there is no other process."""
    return dist.is_available() and dist.is_initialized() and dist.get_backend() == "fake"


def _known(kind: Any, given: Mapping[str, Any], path: str | Path) -> Any:
    names = [field.name for field in fields(kind)]
    unknown = sorted(set(given) - set(names))
    if unknown:
        raise ValueError(f"cluster file {path}: unknown field '{unknown[0]}': use {names}")
    try:
        return kind(**given)
    except TypeError as error:
        raise ValueError(f"cluster file {path}: {error}") from error
