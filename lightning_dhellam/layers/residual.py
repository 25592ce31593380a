"""A block's result joins the residual stream: bias, dropout and sum, in Megatron-core's order."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import Parameter

from lightning_dhellam.kernels.protocols import DropoutKernel
from lightning_dhellam.layers.block import Supported
from lightning_dhellam.layers.norm import Norm
from lightning_dhellam.layers.rules import DRAWN, DRAWS
from lightning_dhellam.layers.writer import GraphWriter

SUPPORTED: Supported = {
    "apply_residual_connection_post_layernorm": (False,),
    "fp32_residual_connection": (False,),
}


@dataclass(frozen=True)
class Residual:
    """The sum after one block.

    Attributes:
        name: which its operators' names begin with.
        p: probability of dropping an element of the block's result.
        counters: of its random numbers, which no other dropout of the model has.
        kernel: of dropout.
        bias: [H], is added to the block's result first; or None. Its gradient is the block's
            affair.
    """

    name: str
    p: float
    counters: tuple[int, int]
    kernel: DropoutKernel
    bias: Parameter | None

    def forward(self, w: GraphWriter, reads: tuple[str, str], write: str) -> None:
        """Add `write`, the sum of a block's result and of the stream before it."""
        p, counters, dropout, bias = self.p, self.counters, self.kernel, self.bias

        def run(
            x: Tensor, residual: Tensor, key: int | None = None, places: Tensor | None = None
        ) -> Tensor:
            if bias is not None:
                x = x + bias
            if key is None:
                return residual + x
            return dropout.forward_add(x, residual, p, dropout.derive_key(key, *counters), places)

        w.compute(
            f"{self.name}.residual",
            (*reads, *DRAWS) if p else reads,
            {write: w.sizes.shard},
            run,
            moved=(3 if bias is None else 5) * w.sizes.shard,
            rule=DRAWN,
        )

    def forward_and_norm(
        self, w: GraphWriter, reads: tuple[str, str], write: str, norm: Norm
    ) -> str:
        """Add `write` as `forward` does, and its norm. Returns the slot of the norm."""
        if norm.fuses and not self.p and self.bias is None:
            return norm.forward_of_sum(w, reads, write)
        self.forward(w, reads, write)
        return norm.forward(w, write)

    def backward(self, w: GraphWriter, grad: str, write: str) -> str:
        """Add the gradient by the block's result. Returns its slot: `grad` without dropout.

        The stream's own share of `grad` is added where the norm before the block is.
        """
        p, counters, dropout = self.p, self.counters, self.kernel
        if not p:
            return grad
        w.compute(
            f"{self.name}.dropout.grad",
            (grad, *DRAWS),
            {write: w.sizes.shard},
            lambda dy, key, places: dropout.backward(
                dy, p, dropout.derive_key(key, *counters), places
            ),
            moved=2 * w.sizes.shard,
            rule=DRAWN,
        )
        return write
