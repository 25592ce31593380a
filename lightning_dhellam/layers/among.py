"""Attention to a block of keys: of whole samples, or within the documents that they hold.

Which it is, a micro-batch says: kernels that keep documents apart are others than those that need
not. The operators are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_dhellam.kernels.attention.heads import Parts
from lightning_dhellam.kernels.choose import Kernels
from lightning_dhellam.kernels.packed_attention import Runs

Hops = tuple[Runs, ...] | None
"""Where the documents of a micro-batch lie in each hop; None where every sample is one."""


@dataclass(frozen=True)
class Among:
    """Forward and backward of a block, in hop 0 causal and of a rank's own keys.

    Shapes are those of `kernels.attention.base`.

    Attributes:
        kernels: what computes it.
        scale: factor on the scores.
    """

    kernels: Kernels
    scale: float

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Hops, hop: int = 0
    ) -> tuple[Tensor, Tensor, Any]:
        """Output, log-sum-exp, and what else backward needs."""
        causal = hop == 0
        if documents is None:
            return self.kernels.attention.forward(q, k, v, self.scale, causal=causal)
        packed = self.kernels.packed_attention
        return packed.forward(q, k, v, self.scale, documents[hop], causal=causal)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        state: Any,
        documents: Hops,
        hop: int = 0,
    ) -> Parts:
        """Gradients by queries, keys and values."""
        read = (dout, q, k, v, out, lse, state, self.scale)
        if documents is None:
            return self.kernels.attention.backward(*read, causal=hop == 0)
        return self.kernels.packed_attention.backward(*read, documents[hop], causal=hop == 0)
