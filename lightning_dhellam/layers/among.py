"""Attention to a block of keys: of whole samples, or within the documents that they hold.

Which it is, a micro-batch says: kernels that keep documents apart are others than those that need
not, and so are those that drop weights, in training alone. The operators are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.kernels.attention.heads import Parts
from lightning_dhellam.kernels.choose import Kernels
from lightning_dhellam.kernels.dropped_attention import Drops
from lightning_dhellam.kernels.packed_attention import Runs
from lightning_dhellam.parallel import zigzag

Hops = tuple[Runs, ...] | None
"""Where the documents of a micro-batch lie in each hop, and last in whole samples; None where every
sample is one."""

Told = Sequence[Any]
"""What a micro-batch says to attention: the values of `Among.told`."""


@dataclass(frozen=True)
class Dropping:
    """Dropout of the weights of attention.

    Attributes:
        p: probability of dropping a weight.
        counters: of its random numbers, which no other dropout of the model has.
        first: number of this rank's first head among all heads.
        heads: number of all heads.
        rank: which of those that share a sequence this one is.
        ranks: how many there are.
    """

    p: float
    counters: tuple[int, int]
    first: int
    heads: int
    rank: int
    ranks: int

    def of(self, key: int, q: Tensor, k: Tensor, hop: int, kernels: Kernels) -> Drops:
        """What is dropped of a hop's block, of queries [S, ...] and keys [T, ...]."""
        queries, keys, length = torch.arange(len(q), device=q.device), None, len(q)
        if self.ranks > 1:
            mine, theirs = zigzag.that_meet(self.rank, self.ranks, hop)
            size = len(q) // len(mine)
            length = 2 * self.ranks * size
            queries, keys = (_places(pieces, size, q.device) for pieces in (mine, theirs))
        derived = kernels.dropout.derive_key(key, *self.counters)
        keys = queries if keys is None else keys
        return Drops(
            self.p, derived, queries, keys, length, self.first, self.heads, kernels.dropout
        )


@dataclass(frozen=True)
class Among:
    """Forward and backward of a block, in hop 0 causal and of a rank's own keys.

    Shapes are those of `kernels.attention.base`.

    Attributes:
        kernels: what computes it.
        scale: factor on the scores.
        dropping: dropout of weights, if there is any.
        window: tokens that each attends to, of itself and those before it; None for all.
    """

    kernels: Kernels
    scale: float
    dropping: Dropping | None = None
    window: int | None = None

    @property
    def told(self) -> tuple[str, ...]:
        """The slots of a micro-batch that every operator of attention reads first."""
        return ("batch.documents",) + ("batch.whole_key",) * (self.dropping is not None)

    @property
    def records(self) -> bool:
        """Whether what backward needs besides may be a graph of autograd."""
        kernels = self.kernels.attention, self.kernels.packed_attention
        return self.dropping is None and any(kernel.records for kernel in kernels)

    def apart(self, values: Sequence[Any]) -> tuple[Told, Sequence[Any]]:
        """What an operator reads: the values of `told`, and those behind them."""
        count = len(self.told)
        return values[:count], values[count:]

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, told: Told, hop: int = 0
    ) -> tuple[Tensor, Tensor, Any]:
        """Output, log-sum-exp, and what else backward needs."""
        causal, runs, drops = hop == 0, _runs(told, hop), self._drops(told, q, k, hop)
        window = self.window
        if drops is not None:
            dropped = self.kernels.dropped_attention
            return *dropped.forward(q, k, v, self.scale, drops, runs, causal=causal), None
        if runs is None:
            return self.kernels.attention.forward(q, k, v, self.scale, causal=causal, window=window)
        return self.kernels.packed_attention.forward(
            q, k, v, self.scale, runs, causal=causal, window=window
        )

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        state: Any,
        told: Told,
        hop: int = 0,
    ) -> Parts:
        """Gradients by queries, keys and values."""
        causal, runs, drops = hop == 0, _runs(told, hop), self._drops(told, q, k, hop)
        window = self.window
        read = (dout, q, k, v, out, lse)
        if drops is not None:
            dropped = self.kernels.dropped_attention
            return dropped.backward(*read, self.scale, drops, runs, causal=causal)
        if runs is None:
            return self.kernels.attention.backward(
                *read, state, self.scale, causal=causal, window=window
            )
        packed = self.kernels.packed_attention
        return packed.backward(*read, state, self.scale, runs, causal=causal, window=window)

    def _drops(self, told: Told, q: Tensor, k: Tensor, hop: int) -> Drops | None:
        """What is dropped; None in evaluation, where a micro-batch has no key."""
        if self.dropping is None or told[1] is None:
            return None
        return self.dropping.of(told[1], q, k, hop, self.kernels)


def _runs(told: Told, hop: int) -> Runs | None:
    documents: Hops = told[0]
    return None if documents is None else documents[hop]


def _places(pieces: Sequence[int], size: int, device: torch.device) -> Tensor:
    """Where the tokens of some pieces of a sequence stand."""
    ranges = [torch.arange(one * size, (one + 1) * size, device=device) for one in pieces]
    return torch.cat(ranges)
