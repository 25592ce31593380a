"""How heads lie in the output of Megatron's query-key-value projection, and how they are cut.

Shapes: S sequence, B batch, G query groups, R queries of a group, D head size, H = G * R heads.
The projection lays out each group as its R queries, then its key, then its value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Parts = tuple[Tensor, Tensor, Tensor]
"""Queries [S, B, H, D], keys and values [S, B, G, D], or their gradients."""


class Heads(NamedTuple):
    """How many heads this rank has, and of which size.

    Attributes:
        groups: query groups, which are also the key and the value heads.
        ratio: query heads of a group.
        size: channels of a head.
    """

    groups: int
    ratio: int
    size: int

    @property
    def queries(self) -> int:
        """Number of query heads."""
        return self.groups * self.ratio

    @property
    def channels(self) -> int:
        """Channels of queries, keys and values together."""
        return (self.queries + 2 * self.groups) * self.size

    def flops(self, length: int, window: int | None = None) -> float:
        """FLOPs of forward per token of a sequence of `length`: causal, half of the square.

        With a `window` those of the keys inside it: of W tokens, W - W / 2 * W / `length` on
        average.
        """
        keys = length / 2
        if window is not None and window < length:
            keys = window * (1 - window / (2 * length))
        return 4.0 * self.queries * self.size * keys

    def cut(self, qkv: Tensor) -> Parts:
        """Queries, keys and values of a projection [S, B, G*(R+2)*D].

        Keys and values are views, and so are queries where each group has one.
        """
        s, b, _ = qkv.shape
        grouped = qkv.view(s, b, self.groups, self.ratio + 2, self.size)
        q, k, v = grouped.split([self.ratio, 1, 1], dim=3)
        return q.reshape(s, b, self.queries, self.size), k.squeeze(3), v.squeeze(3)

    def join(self, dq: Tensor, dk: Tensor, dv: Tensor) -> Tensor:
        """The gradient of a projection [S, B, G*(R+2)*D] from those of what `cut` gave."""
        s, b = dq.shape[:2]
        queries = dq.reshape(s, b, self.groups, self.ratio, self.size)
        parts = [queries, dk.unsqueeze(3), dv.unsqueeze(3)]
        return torch.cat(parts, dim=3).view(s, b, -1)

    def split(self, ordered: Tensor) -> Parts:
        """Queries, keys and values, all of them views.

        `ordered` [S, B, (H+2G)*D] has all queries first, then all keys, then all values.
        """
        s, b, _ = ordered.shape
        heads = ordered.view(s, b, -1, self.size)
        q, k, v = heads.split([self.queries, self.groups, self.groups], dim=2)
        return q, k, v
