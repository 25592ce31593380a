"""What every attention backend is: an explicit forward and backward, causal, without dropout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Backend(ABC):
    """One implementation of causal attention. Dropout is not supported.

    Shapes: S sequence, B batch, H query heads, G key and value heads, D head size.

    Attributes:
        name: by which it is asked for.
        gives_lse: whether `forward` gives the log-sum-exp; some libraries keep it to themselves.
    """

    name: str
    gives_lse: bool = True

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Any]:
        """Attention of `q` [S, B, H, D] over `k`, `v` [S, B, G, D].

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients by `q` [S, B, H, D], `k` and `v` [S, B, G, D] from `dout` [S, B, H*D]."""


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


class AutogradBackend(Backend):
    """A library whose public interface is a differentiable function: its graph is the state.

    What it saves for backward are views of its inputs, its output and the log-sum-exp, which is
    kept in the graph, so the slot for it stays empty.
    """

    gives_lse = False

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """The differentiable function: the arguments of `forward` to its output."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Any]:
        with torch.enable_grad():
            q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
            out = self.attend(q, k, v, scale)
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        recorded: Recorded = state
        recorded.used = True
        # The caller drops the state when it is done, and may time this more than once.
        dq, dk, dv = torch.autograd.grad(
            recorded.out, recorded.leaves, dout.view(recorded.out.shape), retain_graph=True
        )
        return dq, dk, dv
