"""What carries transfers between the stages of a pipeline: a transport for each edge.

A transfer waits only for earlier ones of its edge: sends and their receives are in the same order
whatever the two ranks do otherwise, and a receive that is posted early holds up nothing else. By
process groups an edge has a communicator, which edges share that have no stage in common; by copy
engine a part of the memory that all stages see.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from lightning_dhellam.parallel.copy_engine import SharedMemoryTransport
from lightning_dhellam.parallel.nccl import high_priority
from lightning_dhellam.parallel.topology import Topology
from lightning_dhellam.parallel.transport import GroupTransport, Transport
from lightning_dhellam.plan import Lane
from lightning_dhellam.plan.placement import Edge, Placement

Edges = Mapping[Edge, Transport]
"""What carries the transfers of each edge, on which one stage sends and one receives."""


def open_edges(
    topology: Topology,
    placement: Placement,
    between: Transport,
    device: torch.device,
    timeout: timedelta,
    *,
    tied: bool,
) -> Edges:
    """The edges of this rank's pipeline, connected. Every rank must call this.

    Args:
        topology: of this rank.
        placement: of the chunks, from which the edges follow.
        between: what carries exchanges between the stages: by copy engine edges are parts of its
            memory, of which there must be `parts_of(placement)`.
        device: that computes.
        timeout: after which a transfer fails that a rank does not join.
        tied: whether the head may have the weight of the embedding.
    """
    edges = placement.edges(tied=tied)
    if topology.pp_size == 1:
        return {}
    if isinstance(between, SharedMemoryTransport):
        return {edge: between.part(part, f"edge {edge}") for edge, part in _parts(edges).items()}
    mine: dict[Edge, ProcessGroup] = {}
    for ranks in topology.groups(Lane.PP):
        opened = _open(ranks, edges, timeout)
        if topology.rank in ranks:
            mine = opened
    _connect(mine, topology.pp_rank, device)
    return {edge: GroupTransport(group, Lane.PP, one_way=True) for edge, group in mine.items()}


def parts_of(placement: Placement, *, tied: bool) -> int:
    """Parts of shared memory for the edges of a placement, and one for exchanges of all stages."""
    return 1 + max(_parts(placement.edges(tied=tied)).values(), default=0)


def _parts(edges: Sequence[Edge]) -> dict[Edge, int]:
    """The part of its sender's memory that each edge has, from 1 on."""
    sent: Counter[int] = Counter()
    parts = {}
    for edge in edges:
        sent[edge.source] += 1
        parts[edge] = sent[edge.source]
    return parts


def _connect(edges: Mapping[Edge, ProcessGroup], stage: int, device: torch.device) -> None:
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


def _open(ranks: list[int], edges: Sequence[Edge], timeout: timedelta) -> dict[Edge, ProcessGroup]:
    stages_of: dict[ProcessGroup, set[int]] = {}
    opened: dict[Edge, ProcessGroup] = {}
    for edge in edges:
        ends = {edge.source, edge.target}
        group = next((group for group, taken in stages_of.items() if ends.isdisjoint(taken)), None)
        if group is None:
            group = dist.new_group(ranks, timeout=timeout, pg_options=high_priority())
        stages_of.setdefault(group, set()).update(ends)
        opened[edge] = group
    return opened
