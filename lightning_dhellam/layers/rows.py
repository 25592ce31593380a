"""How many rows go to whose experts, and where they lie there.

Shapes: P ranks that share E experts, L = E / P of them on each, R rows that arrive at one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """How many rows an exchange moves, on the host.

    Attributes:
        given: by this rank to each.
        taken: by this rank from each.
        of_experts: for each expert of this rank.
    """

    given: tuple[int, ...]
    taken: tuple[int, ...]
    of_experts: tuple[int, ...]


def to_host(counts: Tensor) -> Tensor:
    """A copy in memory of the host, which is there when the stream has come as far."""
    if not counts.is_cuda:
        return counts
    copy = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
    return copy.copy_(counts, non_blocking=True)


def rows_of(counts: Tensor, *, rank: int) -> Rows:
    """What the counts [P, E] of all ranks are for this one."""
    ranks, experts = counts.shape
    by_rank = counts.view(ranks, ranks, experts // ranks)
    here = by_rank[:, rank]
    return Rows(
        tuple(by_rank[rank].sum(1).tolist()),
        tuple(here.sum(1).tolist()),
        tuple(here.sum(0).tolist()),
    )


def places_of(counts: Tensor, rows: Rows, *, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where rows ordered by the rank that they come from lie when ordered by expert.

    Returns of each row by expert the one that it was [R], of each row as it arrived the one that
    it becomes [R], and where the rows of each expert end [L], int32.
    """
    ranks, total = len(counts), sum(rows.of_experts)
    here = counts.view(ranks, ranks, -1)[:, rank]
    arrived, ordered = here.flatten(), here.t().flatten()
    begins = (arrived.cumsum(0) - arrived).view(here.shape).t().flatten()
    # How far each piece, of one rank for one expert, is moved. The size is known: nobody waits.
    moved = begins - (ordered.cumsum(0) - ordered)
    numbers = torch.arange(total, device=counts.device)
    origins = numbers + moved.repeat_interleave(ordered, output_size=total)
    spots = torch.empty_like(origins)
    spots[origins] = numbers
    ends = here.sum(0).cumsum(0)
    return origins.to(torch.int32), spots.to(torch.int32), ends.to(torch.int32)
