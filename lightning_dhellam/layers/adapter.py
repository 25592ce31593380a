"""Low-rank adapters of Megatron-core's parallel linear layers (LoRA, arXiv 2106.09685).

A linear layer with weight W [O, I] gets `scale * B A` added to W, of which only A and B are
trained. Where one weight holds several products, such as queries, keys and values, each of its
P adapted products has a B and an A of its own, as if the products were apart:

    down  [P * r, I]  the A of each product, one below the other
    up    [O, r]      row by row the B of the product that the row of W is part of

So `up` is cut and put together as W is. Rows of products without an adapter stay zero.

On tensor-parallel ranks a column-parallel layer has the whole of `down` and its rows of `up`, a
row-parallel one its columns of `down` and the whole of `up`.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn

NAME = "lora"
"""What the adapter of a linear layer is called among the layer's modules."""


class Adapter(nn.Module):
    """The adapter of one linear layer, which its own forward adds too.

    Args:
        linear: a `ColumnParallelLinear` or a `RowParallelLinear`; it gets a hook.
        rank: r, of each product.
        scale: of what is added.
        products: [O], the number of the adapted product of each row of this rank's weight, -1 for
            a row without; None where all rows are of one.
        drawn: the A of each adapted product [r, I], whole.
        dropout: probability of dropping an element of what `down` reads.
    """

    def __init__(
        self,
        linear: Any,
        rank: int,
        scale: float,
        products: Tensor | None,
        drawn: list[Tensor],
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.rank, self.scale, self.dropout = rank, scale, dropout
        self.is_column = isinstance(linear, ColumnParallelLinear)
        weight, group = linear.weight, linear.tp_group
        self.place: int = 0 if self.is_column else group.rank()
        self.ranks: int = 1 if self.is_column else group.size()
        down = torch.cat(drawn)
        if not self.is_column:
            down = down.chunk(self.ranks, dim=1)[self.place]
        self.down = nn.Parameter(down.to(weight))
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        set_tensor_model_parallel_attributes(self.down, not self.is_column, 1, 1)
        set_tensor_model_parallel_attributes(self.up, self.is_column, 0, 1)
        self._own: Tensor | None = None
        if products is not None:
            numbers = torch.arange(len(drawn), device=products.device)
            self._own = (products[:, None] == numbers).to(weight)
        linear.register_forward_hook(_add_adapter)

    def spread(self) -> Tensor:
        """`up` as the product by `down` needs it, [O, P * r]: zero but for each row's own."""
        own = self._own_products()
        return self.up if own is None else (own[:, :, None] * self.up[:, None]).flatten(1)

    def fold(self, grad: Tensor) -> Tensor:
        """The gradient of `up` from that of `spread` [O, P * r]."""
        own = self._own_products()
        if own is None:
            return grad
        return (grad.unflatten(1, (-1, self.rank)) * own[:, :, None]).sum(1)

    def addition(self) -> Tensor:
        """What the adapter adds to this rank's weight, [O, I] in fp32."""
        return self.scale * (self.spread().float() @ self.down.float())

    def dropped(self, x: Tensor) -> Tensor:
        """What `down` reads of an input under plain autograd."""
        return nn.functional.dropout(x, self.dropout, self.training)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"

    def _own_products(self) -> Tensor | None:
        # No buffer: those are shared among ranks and saved. The model may have moved since.
        if self._own is not None and self._own.device != self.up.device:
            self._own = self._own.to(self.up.device)
        return self._own


def adapter_of(linear: Any) -> Adapter | None:
    """The adapter of a linear layer, or None."""
    found: Adapter | None = getattr(linear, NAME, None)
    return found


def draw_down(rank: int, width: int, seed: int) -> Tensor:
    """The A [r, I] that an adapter starts with, uniform as a new `torch.nn.Linear`'s weight."""
    generator = torch.Generator().manual_seed(seed % 2**31)
    return torch.empty(rank, width).uniform_(-1 / sqrt(width), 1 / sqrt(width), generator=generator)


def _add_adapter(linear: Any, args: tuple[Tensor, ...], output: Any) -> Any:
    """Under plain autograd: add what the adapter computes to what the linear layer has."""
    adapter = linear.lora
    y, bias = output
    low = nn.functional.linear(adapter.dropped(args[0]), adapter.down) * adapter.scale
    if adapter.is_column:
        if linear.sequence_parallel:
            low = gather_from_sequence_parallel_region(low, group=linear.tp_group)
        return y + nn.functional.linear(low, adapter.spread()), bias
    found = nn.functional.linear(low, adapter.spread())
    if linear.sequence_parallel:
        found = reduce_scatter_to_sequence_parallel_region(found, group=linear.tp_group)
    return y + found, bias
