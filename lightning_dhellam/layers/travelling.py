"""How keys and values travel between the ranks that share a sequence: as they are, or in 8 bits.

In 8 bits each head of a token has a scale of its own, which travels behind its numbers:

    [2, S, B, G, D] of 16 bits        [2, S, B, G, D + 4] bytes, the last 4 a number of fp32

Attention computes in 16 bits. A rank reads its own keys as they are, and those of others rounded
once, by at most 1/16 of a number; backward reads the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dhellam.kernels.fp8 import FORWARD

_SCALE = 4
"""Bytes of a scale."""
_MOST = torch.finfo(FORWARD).max
_SMALLEST = 1e-30
"""Where nothing is larger all becomes zero."""


@dataclass(frozen=True)
class Travelling:
    """Keys and values on their way.

    Attributes:
        dtype: of attention.
        narrow: whether they travel in 8 bits.
    """

    dtype: torch.dtype
    narrow: bool = False

    def size(self, size: int) -> float:
        """Bytes of a head of `size` numbers."""
        return size + _SCALE if self.narrow else size * self.dtype.itemsize

    def pack(self, k: Tensor, v: Tensor) -> Tensor:
        """What travels of keys and values [S, B, G, D]: [2, S, B, G, D or D + 4]."""
        pair = torch.stack((k, v))
        if not self.narrow:
            return pair
        wide = pair.float()
        largest = wide.abs().amax(-1, keepdim=True)
        scale = torch.where(largest > _SMALLEST, largest / _MOST, 1.0)
        values = (wide / scale).clamp(-_MOST, _MOST).to(FORWARD)
        return torch.cat([values.view(torch.uint8), scale.view(torch.uint8)], dim=-1)

    def unpack(self, pair: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [T, B, G, D] of what has travelled, [2, T, B, G, ...]."""
        if self.narrow:
            scale = pair[..., -_SCALE:].contiguous().view(torch.float32)
            values = pair[..., :-_SCALE].contiguous().view(FORWARD).float()
            pair = (values * scale).to(self.dtype)
        k, v = pair
        return k, v
