"""Communicators of the transfers between neighbouring pipeline stages.

Each strand has its own communicator in each direction of each edge, so that a transfer waits only
for earlier ones of its kind: sends of a communicator and their receives are in the same order
whatever the two ranks do otherwise, and a receive that is posted early holds up nothing else.
Edges that share no stage share a communicator, so a rank is in eight at most.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from torch.distributed import ProcessGroup

ChannelKey = tuple[int, int, str]
"""Source stage, target stage, strand."""

STRANDS = ("forward", "backward")


def open_channels(pipeline: ProcessGroup, world_size: int) -> Mapping[ChannelKey, ProcessGroup]:
    """The communicators of this rank's pipeline. Every rank of the world must call this."""
    stages = pipeline.size()
    if stages == 1:
        return {}
    mine: dict[ChannelKey, ProcessGroup] = {}
    count = world_size // stages
    for first in range(count):
        # Pipeline ranks are the outermost of Megatron's order.
        ranks = list(range(first, world_size, count))
        opened = _open(ranks)
        if dist.get_rank() in ranks:
            assert dist.get_process_group_ranks(pipeline) == ranks, "an unknown order of ranks"
            mine = opened
    return mine


def _open(ranks: list[int]) -> dict[ChannelKey, ProcessGroup]:
    stages = len(ranks)
    opened: dict[ChannelKey, ProcessGroup] = {}
    for strand in STRANDS:
        for parity in range(min(2, stages - 1)):
            down, up = dist.new_group(ranks), dist.new_group(ranks)
            for edge in range(parity, stages - 1, 2):
                opened[edge, edge + 1, strand] = down
                opened[edge + 1, edge, strand] = up
    return opened
