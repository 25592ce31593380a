"""An expert of every token as operators: an MLP, perhaps with a gate of its own.

forward   gather|fc1  swiglu  fc2|scatter  (gate)
backward  (gate)  gather|fc2  swiglu  fc1|scatter  (add)

The gate [s, B, 1] is the sigmoid of a product of the hidden states by a vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_dhellam.layers.block import Setting
from lightning_dhellam.layers.mlp import Mlp
from lightning_dhellam.layers.rules import OF_TOKENS
from lightning_dhellam.layers.writer import GraphWriter, main_grad

PREFIX = "shared_"
"""Which its slots and operators begin with."""


@dataclass(frozen=True)
class SharedExpert:
    """A Megatron-core `SharedExpertMLP`.

    Attributes:
        mlp: what it computes of every token.
        gate: what the gate is the product by [1, H], or None.
    """

    mlp: Mlp
    gate: Parameter | None

    @classmethod
    def of(cls, module: Any, setting: Setting) -> SharedExpert:
        """What lowers `module`; what it would compute otherwise is refused by name."""
        return cls(Mlp.of(module, setting, PREFIX), module.gate_weight)

    def forward(self, w: GraphWriter, read: str) -> str:
        """Add the operators of forward. Returns the slot of the result [s, B, H]."""
        found, gate = self.mlp.forward(w, read), self.gate
        if gate is None:
            return found
        w.compute(
            f"{PREFIX}gate",
            (found, read),
            {f"{PREFIX}gated": w.sizes.shard},
            lambda y, x: (y * _score(x, gate)).to(y.dtype),
            moved=3 * w.sizes.shard,
            rule=OF_TOKENS,
        )
        return f"{PREFIX}gated"

    def backward(self, w: GraphWriter, grad: str, read: str) -> str:
        """Add the operators of backward. Returns the slot of the gradient by `read`."""
        gate = self.gate
        if gate is None:
            return self.mlp.backward(w, grad, read)

        def run(dy: Tensor, y: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            score, wide = _score(x, gate), dy.float()
            d_logit = (wide * y).sum(-1, keepdim=True) * score * (1 - score)
            if gate.requires_grad:
                main_grad(gate).add_((d_logit * x).flatten(0, -2).sum(0))
            return (wide * score).to(dy.dtype), (d_logit * gate).to(x.dtype)

        by_gate, name = f"d_{read}_by_gate", f"d_{self.mlp.output}"
        w.compute(
            f"{PREFIX}gate.grad",
            (grad, self.mlp.fc2.written(w), read),
            {name: w.sizes.shard, by_gate: w.sizes.shard},
            run,
            moved=5 * w.sizes.shard,
            accumulates=(gate,),
            rule=OF_TOKENS,
        )
        parts = (self.mlp.backward(w, name, read), by_gate)
        written = f"d_{read}_shared"
        w.compute(
            f"{PREFIX}gate.add",
            parts,
            {written: w.sizes.shard},
            torch.add,
            moved=3 * w.sizes.shard,
        )
        return written


def _score(x: Tensor, gate: Parameter) -> Tensor:
    """The gate of each token [s, B, 1], fp32."""
    return torch.sigmoid((x.float() * gate.float()).sum(-1, keepdim=True))
