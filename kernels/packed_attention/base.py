"""What every backend of packed attention is: an explicit forward and backward, without dropout.

Documents lie one behind the other in the samples of a micro-batch, and each attends to itself
alone. Kernels call that the variable-length form: of all samples one row of tokens, sample after
sample, and where in it each document ends.

    samples     a a a b b | c c d d d
    queries     0     3   5   7     10

Blocks of keys are merged as in `attention.base`; a document may then have queries in a block but no
keys, or keys but no queries.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_dhellam.kernels.attention.base import Recorded


class Runs(NamedTuple):
    """Where the N documents of a micro-batch lie in one row of its tokens, sample after sample.

    A document's queries are those from its place in `queries` to the next one, and attend to its
    keys, which `keys` says likewise.

    Attributes:
        queries: [N + 1] int32, from 0 to B * S, ascending.
        keys: [N + 1] int32, from 0 to B * T, ascending.
        longest: the most queries or keys that a document has, known to the host.
    """

    queries: Tensor
    keys: Tensor
    longest: int


class PackedBackend(ABC):
    """One implementation of attention among documents. Dropout is not supported.

    Shapes: S queries, T keys, B batch, H query heads, G key and value heads, D head size. With
    `causal` T is S, and each token attends to itself and those before it in its document, with a
    `window` of W tokens to the W - 1 before it, and there may be more keys then, of which the last
    S are those of the queries; otherwise every query attends to every key of its document.

    Attributes:
        name: by which it is asked for.
        records: whether what else backward needs is a graph of autograd.
    """

    name: str
    records: bool = False

    @abstractmethod
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        runs: Runs,
        *,
        causal: bool = True,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor, Any]:
        """Attention of `q` [S, B, H, D] over `k`, `v` [T, B, G, D].

        Returns the output [S, B, H*D]; the natural logarithm of the sum of exponentials of each
        token's scaled scores, [B, H, S] in fp32, or an empty tensor where it is not given; and
        what else backward needs. Of a token that has no keys they are 0 and -inf.
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
        state: Any,
        scale: float,
        runs: Runs,
        *,
        causal: bool = True,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients by `q` [S, B, H, D], `k` and `v` [T, B, G, D] from `dout` [S, B, H*D].

        `out` and `lse` are those of all keys that the queries attend to, of which `k` and `v` may
        be a block; `state` is what `forward` of this block gave.
        """


class AutogradPackedBackend(PackedBackend):
    """A library whose public interface is a differentiable function; see `AutogradBackend`."""

    records = True
    serves_once = False

    @abstractmethod
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        runs: Runs,
        window: int | None = None,
    ) -> Tensor:
        """The differentiable function, causal: of rows of tokens [B*S, heads, D] to [B*S, H, D]."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        runs: Runs,
        *,
        causal: bool = True,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor, Any]:
        assert causal, f"{self.name} takes no blocks"
        with torch.enable_grad():
            q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
            row = self.attend(in_a_row(q), in_a_row(k), in_a_row(v), scale, runs, window)
            out = in_samples(row, q.shape[1]).flatten(2).contiguous()
        return out.detach(), out.new_empty(0, dtype=torch.float32), Recorded((q, k, v), out)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        state: Any,
        scale: float,
        runs: Runs,
        *,
        causal: bool = True,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        recorded: Recorded = state
        if recorded.used and self.serves_once:
            # Who times this waits for a forward as well, but no step does.
            _, _, recorded = self.forward(q, k, v, scale, runs, window=window)
        return recorded.gradients(dout)


def in_a_row(x: Tensor) -> Tensor:
    """[S, B, ...] as one row of tokens, sample after sample, [B*S, ...]: of one sample a view."""
    return x.transpose(0, 1).flatten(0, 1)


def in_samples(row: Tensor, batch: int) -> Tensor:
    """What `in_a_row` has made a row of: a view [S, B, ...]."""
    return row.unflatten(0, (batch, -1)).transpose(0, 1)
