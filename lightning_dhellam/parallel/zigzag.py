"""How context-parallel ranks share a sequence: two pieces each, so that all compute as much.

With a causal mask later tokens attend to more. So a sequence is cut into 2C pieces of equal length,
and rank r has the pieces r and 2C-1-r, one behind the other:

    piece   0 1 2 3 4 5 6 7
    rank    0 1 2 3 3 2 1 0

In this order a rank's tokens are in the order of the sequence, so that causal attention among them
is causal attention of one short sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pieces_of(rank: int, ranks: int) -> tuple[int, int]:
    """The two pieces of `rank`, of the 2 * `ranks` of a sequence."""
    return rank, 2 * ranks - 1 - rank


def source_of(rank: int, ranks: int, hop: int) -> int:
    """Whose keys `rank` attends to in a hop: its own in the first."""
    return (rank - hop) % ranks


def is_late(rank: int, hop: int) -> bool:
    """Whether the keys of a hop lie between the two pieces of `rank`.

    Then its second piece alone attends to them, and to all; otherwise both pieces do, to the first
    half of them, but for its own.
    """
    return hop > rank


def that_meet(rank: int, ranks: int, hop: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The pieces of `rank` that attend in a hop, and those that they attend to."""
    own, others = pieces_of(rank, ranks), pieces_of(source_of(rank, ranks, hop), ranks)
    if hop == 0:
        return own, others
    return (own[1:], others) if is_late(rank, hop) else (own, others[:1])


def own_part(whole: Tensor, dim: int, rank: int, ranks: int) -> Tensor:
    """The tokens of `rank` in `whole`, whose dimension `dim` is the sequence."""
    if ranks == 1:
        return whole
    pieces = whole.chunk(2 * ranks, dim)
    return torch.cat([pieces[piece] for piece in pieces_of(rank, ranks)], dim)


def places(length: int, rank: int, ranks: int, device: torch.device) -> Tensor:
    """Where in a sequence of `length` each token of `rank` stands: [length / ranks] int64."""
    if ranks == 1:
        return torch.arange(length, device=device)
    size = length // (2 * ranks)
    pieces = (range(piece * size, (piece + 1) * size) for piece in pieces_of(rank, ranks))
    return torch.cat([torch.arange(one.start, one.stop, device=device) for one in pieces])


def whole_sequence(parts: Tensor, dim: int) -> Tensor:
    """The sequence from the tokens of all ranks: `parts` [ranks, ...], by rank.

    `dim` is the dimension of the sequence in each of them.
    """
    ranks = len(parts)
    halves = [part.chunk(2, dim) for part in parts]
    order = [*range(ranks), *reversed(range(ranks))]
    return torch.cat([halves[rank][i >= ranks] for i, rank in enumerate(order)], dim)
