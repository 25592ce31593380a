"""What communication takes that was not measured: by its bytes and the level of its network.

A ring of n ranks passes n - 1 parts from neighbour to neighbour, so of what it brings (n - 1) / n
cross the link of each rank, and an all-reduce is two of them (Thakur, Rabenseifner and Gropp, 2005;
bus bandwidth in nccl-tests' PERFORMANCE.md). Each step costs a hop, longer between nodes:

    seconds = latency + hops + bytes that cross / bandwidth

A tree adds up in as many hops as the logarithm of the number of nodes, but at 0.9 of the bandwidth:
an all-reduce takes the faster of the two, as NCCL does (src/graph/tuning.cc).
"""

from __future__ import annotations

from math import ceil, log2

from lightning_dhellam.parallel.networks import Reach
from lightning_dhellam.plan import Collective

_TREE = 0.9
"""Share of the bandwidth that a tree has, by NCCL's own estimate."""


def seconds_of(collective: Collective | None, crossing: float, reach: Reach) -> float:
    """Return the seconds of a collective.

    Args:
        collective: what it does; None for what all ranks of a ring take part in.
        crossing: bytes that cross the link of each rank, by a ring.
        reach: the ranks that take part.
    """
    if reach.size == 1:
        return 0.0
    network = reach.network
    if collective in (Collective.SEND, Collective.RECEIVE, Collective.EXCHANGE):
        return network.latency + network.hop + crossing / reach.ring
    if collective is Collective.ALL_TO_ALL:
        return network.latency + network.hop + crossing / reach.straight
    rounds = 2 if collective is Collective.ALL_REDUCE else 1
    ring = network.latency + rounds * _ring_hops(reach) + crossing / reach.ring
    if collective is not Collective.ALL_REDUCE:
        return ring
    tree = network.latency + 2 * _tree_hops(reach) + crossing / (_TREE * reach.ring)
    return min(ring, tree)


def reduction_seconds(size: float, reach: Reach, *, sharded: bool) -> float:
    """Return the seconds in which gradients of `size` bytes are added up over ranks.

    Where the optimizer's state is `sharded`, each rank gets its part of the sums alone.
    """
    once = size * (reach.size - 1) / reach.size
    if sharded:
        return seconds_of(Collective.REDUCE_SCATTER, once, reach)
    return seconds_of(Collective.ALL_REDUCE, 2 * once, reach)


def _ring_hops(reach: Reach) -> float:
    outer = reach.nodes - 1
    inner = reach.size - 1 - outer
    return inner * reach.networks.inside.hop + outer * reach.network.hop


def _tree_hops(reach: Reach) -> float:
    inner = (reach.inside - 1) * reach.networks.inside.hop
    return inner + ceil(log2(reach.nodes)) * reach.network.hop
