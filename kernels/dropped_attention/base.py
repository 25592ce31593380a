"""What every backend of attention with dropout is, and which weights it drops.

Whether a query's weight of a key is dropped follows from the sample, the head and where both stand
in the sequence. So forward and backward drop the same, whatever order they run in, and ranks that
share heads or sequences drop what one rank would. Libraries that draw by a generator's state, or by
how their own blocks of keys lie, cannot do that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_dhellam.kernels.packed_attention.base import Runs
from lightning_dhellam.kernels.protocols import DropoutKernel


@dataclass(frozen=True)
class Drops:
    """Which weights of a block are dropped.

    The weights of one query by one head are a row of as many elements as the sequence has tokens.
    Rows are counted by sample, then by head, then by token.

    Attributes:
        p: probability of dropping a weight.
        key: of the random numbers.
        queries: where in the sequence the queries of the block stand, [S] int64.
        keys: where its keys stand, [T] int64.
        length: tokens of the whole sequence.
        first: number of the first head that is here among all heads.
        heads: number of all heads.
        kernel: of dropout.
    """

    p: float
    key: int
    queries: Tensor
    keys: Tensor
    length: int
    first: int
    heads: int
    kernel: DropoutKernel

    def factors(self, like: Tensor, rows: slice) -> Tensor:
        """0 or `1 / (1 - p)` for each weight: `like` [B, H, rows, T], in its type."""
        batch, heads = like.shape[:2]
        device = like.device
        samples = torch.arange(batch, device=device)[:, None] * self.heads + self.first
        row = samples + torch.arange(heads, device=device)
        places = (row[..., None] * self.length + self.queries[rows]).flatten()
        whole = like.new_ones(len(places), self.length)
        drawn = self.kernel.forward(whole, self.p, self.key, places)
        if like.shape[3] < self.length:
            drawn = drawn.index_select(1, self.keys)
        return drawn.view(like.shape)


class DroppingBackend(ABC):
    """One implementation of attention whose weights are dropped.

    Shapes are those of `attention.base` and, with documents, of `packed_attention.base`. Blocks of
    keys are merged as there: the log-sum-exp is that of all weights, dropped or not.

    Attributes:
        name: by which it is asked for.
    """

    name: str

    @abstractmethod
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        drops: Drops,
        runs: Runs | None = None,
        *,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Attention of `q` [S, B, H, D] over `k`, `v` [T, B, G, D], within documents if there are.

        Returns the output [S, B, H*D], and the natural logarithm of the sum of exponentials of
        each token's scaled scores, [B, H, S] in fp32. Of a token without keys they are 0 and -inf.
        """

    @abstractmethod
    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        drops: Drops,
        runs: Runs | None = None,
        *,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients by `q` [S, B, H, D], `k` and `v` [T, B, G, D] from `dout` [S, B, H*D].

        `out` and `lse` are those of all keys that the queries attend to, of which `k` and `v` may
        be a block.
        """
