"""Communicators of the transfers between neighbouring pipeline stages.

Each strand has its own communicator in each direction of each edge, so that a transfer waits only
for earlier ones of its kind: sends of a communicator and their receives are in the same order
whatever the two ranks do otherwise, and a receive that is posted early holds up nothing else.
Edges that share no stage share a communicator, so a rank is in eight at most.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from lightning_dhellam.parallel.nccl import high_priority
from lightning_dhellam.parallel.topology import Topology
from lightning_dhellam.plan import Lane

EdgeKey = tuple[int, int, str]
"""Source stage, target stage, strand."""

STRANDS = ("forward", "backward")


def open_edges(
    topology: Topology, device: torch.device, timeout: timedelta
) -> Mapping[EdgeKey, ProcessGroup]:
    """The communicators of this rank's pipeline, connected. Every rank must call this."""
    if topology.pp_size == 1:
        return {}
    mine: dict[EdgeKey, ProcessGroup] = {}
    for ranks in topology.groups(Lane.PP):
        opened = _open(ranks, timeout)
        if topology.rank in ranks:
            mine = opened
    _connect(mine, topology.pp_rank, device)
    return mine


def _connect(edges: Mapping[EdgeKey, ProcessGroup], stage: int, device: torch.device) -> None:
    """Send one number along each edge.

    NCCL may connect two ranks at their first transfer, and keeps both hosts waiting meanwhile. Here
    all ranks go through the edges in the same order; in a step they do not.
    """
    number = torch.zeros(1, device=device)
    for (source, target, _), group in edges.items():
        if stage == source:
            dist.send(number, group=group, group_dst=target)
        elif stage == target:
            dist.recv(number, group=group, group_src=source)


def _open(ranks: list[int], timeout: timedelta) -> dict[EdgeKey, ProcessGroup]:
    stages = len(ranks)
    opened: dict[EdgeKey, ProcessGroup] = {}
    for strand in STRANDS:
        for parity in range(min(2, stages - 1)):
            down, up = (
                dist.new_group(ranks, timeout=timeout, pg_options=high_priority()) for _ in range(2)
            )
            for edge in range(parity, stages - 1, 2):
                opened[edge, edge + 1, strand] = down
                opened[edge + 1, edge, strand] = up
    return opened
