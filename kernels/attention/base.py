"""What every attention backend is: an explicit forward and backward, without dropout.

Attention over many keys can be had in blocks: each gives an output and a log-sum-exp, of which
`kernels.merge` makes those of all keys together. Backward of one block, with the *merged* output
and log-sum-exp, gives what the block adds to the gradients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Backend(ABC):
    """One implementation of attention. Dropout is not supported.

    Shapes: S queries, T keys, B batch, H query heads, G key and value heads, D head size. With
    `causal` T is S, and each token attends to itself and those before it; otherwise every query
    attends to every key. With a `window` of W tokens, which is causal always, each attends to
    itself and the W - 1 before it; there may be more keys then, of which the last S are those of
    the queries.

    Attributes:
        name: by which it is asked for.
        gives_lse: whether `forward` gives the log-sum-exp; some libraries keep it to themselves.
            Without it a backend takes no blocks: it is causal always.
        records: whether what else backward needs is a graph of autograd.
    """

    name: str
    gives_lse: bool = True
    records: bool = False

    @abstractmethod
    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        *,
        causal: bool = True,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor, Any]:
        """Attention of `q` [S, B, H, D] over `k`, `v` [T, B, G, D].

        Returns the output [S, B, H*D]; the natural logarithm of the sum of exponentials of each
        token's scaled scores, [B, H, S] in fp32, or an empty tensor where it is not given; and
        what else backward needs.
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
        *,
        causal: bool = True,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients by `q` [S, B, H, D], `k` and `v` [T, B, G, D] from `dout` [S, B, H*D].

        `out` and `lse` are those of all keys that the queries attend to, of which `k` and `v` may
        be a block; `state` is what `forward` of this block gave.
        """


def flash_window(window: int | None) -> tuple[int, int]:
    """How flash-attn and those like it are told: keys before and after a token, -1 for all."""
    return (-1, -1) if window is None else (window - 1, 0)


@dataclass
class Recorded:
    """What autograd has recorded of a forward.

    Attributes:
        leaves: queries, keys and values.
        out: made from them.
        used: whether a backward went through it.
    """

    leaves: tuple[Tensor, Tensor, Tensor]
    out: Tensor
    used: bool = False

    def gradients(self, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients by the leaves, from `dout` of as many numbers as the output."""
        self.used = True
        # The caller drops the state when it is done, and may time this more than once.
        dq, dk, dv = torch.autograd.grad(
            self.out, self.leaves, dout.view(self.out.shape), retain_graph=True
        )
        return dq, dk, dv


class AutogradBackend(Backend):
    """A library whose public interface is a differentiable function: its graph is the state.

    What it saves for backward are views of its inputs, its output and the log-sum-exp, which is
    kept in the graph, so the slot for it stays empty.

    Attributes:
        serves_once: whether that graph is good for one backward.
    """

    gives_lse = False
    records = True
    serves_once = False

    @abstractmethod
    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """The differentiable function: the arguments of `forward` to its output."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        *,
        causal: bool = True,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor, Any]:
        assert causal, f"{self.name} takes no blocks"
        with torch.enable_grad():
            q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
            out = self.attend(q, k, v, scale, window)
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
        *,
        causal: bool = True,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        recorded: Recorded = state
        if recorded.used and self.serves_once:
            # Who times this waits for a forward as well, but no step does.
            _, _, recorded = self.forward(q, k, v, scale, window=window)
        return recorded.gradients(dout)
