"""Who communicates on a lane, and by what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from lightning_dhellam.parallel.duplex import open_duplex
from lightning_dhellam.parallel.topology import LANES, Topology
from lightning_dhellam.parallel.transport import Alone, GroupTransport, Transport
from lightning_dhellam.plan import Collective, Lane

_WITHIN_LAYERS = (Lane.TP, Lane.CP, Lane.EP)
"""Lanes whose collectives are operators of ours; Megatron-core starts those of the others."""


@dataclass(frozen=True)
class Communicator:
    """The ranks of a lane, and what carries their collectives.

    Attributes:
        lane: which lane of an operator.
        group: the process group of its ranks; without torch.distributed one of a single rank.
        transport: what carries collectives between them.
        rank: of this process in the group.
        size: how many ranks there are.
    """

    lane: Lane
    group: ProcessGroup
    transport: Transport
    rank: int
    size: int

    def processors(self, collective: Collective) -> int:
        """Multiprocessors that such a collective of this lane occupies."""
        return self.transport.processors(collective)


Communicators = Mapping[Lane, Communicator]


def open_communicators(
    topology: Topology, groups: ProcessGroupCollection, device: torch.device, timeout: timedelta
) -> Communicators:
    """The communicators of this rank. Every rank must call this.

    A transfer that a rank does not join fails after `timeout`.
    """
    opened = {}
    for lane in LANES:
        group = getattr(groups, lane.value)
        transport: Transport | None = None
        if topology.size(lane) == 1:
            transport = Alone()
        elif device.type == "cpu" and lane in _WITHIN_LAYERS and dist.get_backend(group) == "gloo":
            transport = open_duplex(topology, lane, timeout)
        opened[lane] = Communicator(
            lane, group, transport or GroupTransport(group, lane), group.rank(), group.size()
        )
    return opened


def alone(group: ProcessGroup) -> Communicators:
    """Communicators of one rank, whose group it is on every lane."""
    return {lane: Communicator(lane, group, Alone(), 0, 1) for lane in LANES}
