"""Philox4x32-10 in integer torch operations (Salmon et al., SC 2011, "Parallel random numbers").

It turns a key and a counter into four 32-bit words. Each row of a tensor has counters of its own,
as many as blocks of 4 * SPAN elements cover it, that begin at the row's place times their number.
Element `e` of a row takes word `q` of its counter `c`, where
`e = (c // SPAN) * 4 * SPAN + q * SPAN + c % SPAN`: the four words of a counter go to four
contiguous runs, which is how a GPU program wants to load and store them.
"""

from __future__ import annotations

import torch
from torch import Tensor

SPAN = 512

_MASK = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10


def words(places: Tensor, width: int, key: int) -> Tensor:
    """A random 32-bit word, as int64, for each of `width` elements of rows at `places`."""
    blocks = -(-width // (4 * SPAN))
    used = (blocks - 1) * SPAN + min(SPAN, width - (blocks - 1) * 4 * SPAN)
    counters = places[:, None] * (blocks * SPAN) + torch.arange(used, device=places.device)
    drawn = torch.stack(philox(counters, key), dim=-1).flatten(1)
    element = torch.arange(width, device=places.device)
    counter, word = element // (4 * SPAN) * SPAN + element % SPAN, element // SPAN % 4
    return drawn.index_select(1, 4 * counter + word)


def philox(counter: Tensor, key: int) -> list[Tensor]:
    """The four words of each counter: int64 in [0, 2**32)."""
    zero = torch.zeros_like(counter)
    c = [counter & _MASK, counter >> 32, zero, zero]
    low, high = key & _MASK, key >> 32 & _MASK
    for _ in range(_ROUNDS):
        # Products wrap around at 64 bits; their two halves come out right all the same.
        even, odd = c[0] * _MULTIPLIERS[0], c[2] * _MULTIPLIERS[1]
        c = [
            odd >> 32 & _MASK ^ c[1] ^ low,
            odd & _MASK,
            even >> 32 & _MASK ^ c[3] ^ high,
            even & _MASK,
        ]
        low, high = low + _WEYL[0] & _MASK, high + _WEYL[1] & _MASK
    return c


def threshold(p: float) -> int:
    """A word below this number drops its element."""
    return round(p * (_MASK + 1))
