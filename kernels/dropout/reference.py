"""Plain torch: the ground truth, and the CPU path.

The mask is drawn again in backward from the same key, so it is never saved, and it cannot depend
on the order in which operators run. Every backend draws the same bits.

A tensor is a row for each index of its first dimension. What is drawn for a row follows from its
place, so that ranks that share a sequence draw for their tokens what one rank would. Where they
share what a row consists of, `columns` says of which elements a tensor has its part: the number of
the first, and how many the whole row has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dhellam.kernels.dropout.philox import threshold, words

_MASK = (1 << 64) - 1

Columns = tuple[int, int] | None
"""The first element of a part of a row, and the number of all; None for whole rows."""


def derive_key(key: int, *counters: int) -> int:
    """A new 63-bit key from a key and counters (splitmix64's finaliser on each)."""
    for counter in counters:
        key = key * 0x9E3779B97F4A7C15 + counter + 1 & _MASK
        key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9 & _MASK
        key = (key ^ key >> 27) * 0x94D049BB133111EB & _MASK
        key ^= key >> 31
    return key >> 1


def forward(
    x: Tensor, p: float, key: int, places: Tensor | None = None, columns: Columns = None
) -> Tensor:
    """Zero each element of `x` [s, ...] with probability `p`, and scale others by `1 / (1 - p)`.

    `places` [s] says where in the whole each row stands; its index, if not given.
    """
    return (x.float() * _factors(x, p, key, places, columns)).to(x.dtype)


def forward_add(
    x: Tensor, residual: Tensor, p: float, key: int, places: Tensor | None = None
) -> Tensor:
    """`residual` plus `forward` of `x`, rounded once."""
    return (residual.float() + x.float() * _factors(x, p, key, places, None)).to(x.dtype)


def backward(
    dy: Tensor, p: float, key: int, places: Tensor | None = None, columns: Columns = None
) -> Tensor:
    """Gradient of `forward` by `x`, with the same `p`, `key`, `places` and `columns`."""
    return forward(dy, p, key, places, columns)


def _factors(like: Tensor, p: float, key: int, places: Tensor | None, columns: Columns) -> Tensor:
    """0 or `1 / (1 - p)` for each element, in fp32."""
    if places is None:
        places = torch.arange(len(like), device=like.device)
    width = like[0].numel()
    first, whole = columns or (0, width)
    drawn = words(places, whole, key)[:, first : first + width]
    keep = drawn >= threshold(p)
    return keep.reshape(like.shape).float().mul_(1 / (1 - p) if p < 1 else 0.0)
