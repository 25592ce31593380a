"""Norms of all queries and all keys of a token, whose heads tensor-parallel ranks share (OLMo-2).

    forward   qkv  squares  gather|head_norm  (rope)  attention
    backward  attention  (rope)  dots  gather|head_norm  qkv

A rank has some of the heads and their weights. What it needs of the others' is two numbers of each
token in each direction: the sums of the squares of queries and keys, and what their gradients by
these sums add up to. Ranks gather each other's sums, and add them up alike.

Shapes: S sequence, B batch, T ranks, Q and K channels of this rank's queries and keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import Parameter

from lightning_dhellam.kernels.attention.heads import Heads
from lightning_dhellam.layers.rules import on_tp
from lightning_dhellam.layers.writer import GraphWriter, main_grad
from lightning_dhellam.parallel import collectives
from lightning_dhellam.plan import Collective, Lane
from lightning_dhellam.plan.layout import Held


class WideNorm(nn.Module):
    """RMSNorm of all heads of a token together. The constructor is that of a norm of each head.

    Args:
        config: of the layer.
        hidden_size: channels of a head.
        eps: added to the mean square.

    Attributes:
        weight: of this rank's heads.
        group: of the ranks that have the others; None for none.
    """

    group: ProcessGroup | None = None

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.eps = eps
        self.ranks = config.tensor_model_parallel_size
        width = self._heads(config) * hidden_size // self.ranks
        self.weight = Parameter(torch.ones(width, dtype=config.params_dtype, device=device))
        # Megatron-core's marks of what tensor-parallel ranks have a part of each.
        marks = {"tensor_model_parallel": True, "partition_dim": 0, "partition_stride": 1}
        for name, value in marks.items():
            setattr(self.weight, name, value)

    def _heads(self, config: TransformerConfig) -> int:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [S, B, heads, D] of this rank to the same shape and dtype."""
        wide = x.flatten(2).float()
        squares = wide.square().sum(-1, keepdim=True)
        if self.ranks > 1:
            # Each rank's heads depend on all ranks' sums: the gradient is added up as well.
            squares = copy_to_tensor_model_parallel_region(
                reduce_from_tensor_model_parallel_region(squares, self.group), self.group
            )
        scale = torch.rsqrt(squares / (self.ranks * wide.shape[-1]) + self.eps)
        return (self.weight * (wide * scale).to(x.dtype)).view_as(x)


class WideQueryNorm(WideNorm):
    """The norm of queries."""

    def _heads(self, config: TransformerConfig) -> int:
        return config.num_attention_heads


class WideKeyNorm(WideNorm):
    """The norm of keys."""

    def _heads(self, config: TransformerConfig) -> int:
        assert config.num_query_groups is not None
        return config.num_query_groups


@dataclass(frozen=True)
class SharedNorm:
    """Both norms as operators, where ranks share the heads.

    Attributes:
        query: the module of queries; its weight [Q] is read, and its `main_grad` added to.
        key: that of keys [K].
        heads: of this rank.
        cut: queries, keys and values of what the projection leaves, as views.
        join: puts them where they were.
    """

    query: WideNorm
    key: WideNorm
    heads: Heads
    cut: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
    join: Callable[[Tensor, Tensor, Tensor], Tensor]

    def forward(self, w: GraphWriter, read: str, write: str) -> None:
        """Add `write`, queries and keys of `read` [S, B, G*(R+2)*D] normalised, with its values."""
        size = w.sizes.wide(self.heads.channels)

        def squares(qkv: Tensor) -> Tensor:
            parts = self.cut(qkv)[:2]
            return torch.stack([x.flatten(2).float().square().sum(-1) for x in parts], dim=-1)

        def run(qkv: Tensor, every: Tensor) -> tuple[Tensor, Tensor]:
            queries, keys, values = self.cut(qkv)
            rstd = torch.rsqrt(self._of_all(every, qkv) + self.query.eps)
            by_queries, by_keys = (
                (norm.weight * (x.flatten(2).float() * scale).to(x.dtype)).view_as(x)
                for norm, x, scale in self._both(queries, keys, rstd)
            )
            return self.join(by_queries, by_keys, values), rstd

        w.compute(
            "head_norm.squares",
            (read,),
            {"squares": 8},
            squares,
            moved=size,
            rule=on_tp(Held.HEADS, Held.PARTIAL),
        )
        self._gather(w, "head_norm.gather", "squares", "all_squares")
        w.compute(
            "head_norm",
            (read, "all_squares"),
            {write: size, "norm_rstd": 8},
            run,
            moved=2 * size,
            rule=on_tp((Held.HEADS, Held.REPLICATED), (Held.HEADS, Held.REPLICATED)),
        )

    def backward(self, w: GraphWriter, grad: str, read: str, write: str) -> None:
        """Add the gradient by `read`, from `grad` of what `forward` wrote, and of the weights."""
        size = w.sizes.wide(self.heads.channels)

        def dots(grad: Tensor, qkv: Tensor, rstd: Tensor) -> Tensor:
            found = []
            d_parts, parts = self.cut(grad)[:2], self.cut(qkv)[:2]
            of_grads, of_values = self._both(*d_parts, rstd), self._both(*parts, rstd)
            for (norm, dy, scale), (_, x, _) in zip(of_grads, of_values, strict=True):
                product = dy.flatten(2).float() * (x.flatten(2).float() * scale)
                if norm.weight.requires_grad:
                    main_grad(norm.weight).add_(product.sum((0, 1)))
                found.append((product * norm.weight.float()).sum(-1))
            return torch.stack(found, dim=-1)

        def run(grad: Tensor, qkv: Tensor, rstd: Tensor, every: Tensor) -> Tensor:
            d_queries, d_keys, d_values = self.cut(grad)
            queries, keys, _ = self.cut(qkv)
            mean = self._of_all(every, qkv)
            given = self._both(d_queries, d_keys, rstd), self._both(queries, keys, mean)
            found = []
            for (norm, dy, scale), (_, x, dot) in zip(*given, strict=True):
                wide = dy.flatten(2).float() * norm.weight.float()
                normed = x.flatten(2).float() * scale
                found.append(((wide - normed * dot) * scale).to(dy.dtype).view_as(x))
            return self.join(found[0], found[1], d_values)

        w.compute(
            "head_norm.dots",
            (grad, read, "norm_rstd"),
            {"dots": 8},
            dots,
            moved=2 * size,
            accumulates=(self.query.weight, self.key.weight),
            rule=on_tp((Held.HEADS, Held.HEADS, Held.REPLICATED), Held.PARTIAL, Held.HEADS),
        )
        self._gather(w, "head_norm.grad_gather", "dots", "all_dots")
        w.compute(
            "head_norm.grad",
            (grad, read, "norm_rstd", "all_dots"),
            {write: size},
            run,
            moved=3 * size,
            rule=on_tp((Held.HEADS, Held.HEADS, Held.REPLICATED, Held.REPLICATED), Held.HEADS),
        )

    def _gather(self, w: GraphWriter, name: str, read: str, write: str) -> None:
        """Add what brings every rank's sums [S, B, 2] to all, one below the other."""
        w.collective(
            Lane.TP,
            name,
            (read,),
            {write: 8 * w.sizes.tp},
            collectives.all_gather,
            Collective.ALL_GATHER,
            on_tp(Held.PARTIAL, Held.REPLICATED),
            crossing=8 * (w.sizes.tp - 1),
        )

    def _of_all(self, every: Tensor, qkv: Tensor) -> Tensor:
        """Means [S, B, 2] over all channels, from every rank's sums [T*S, B, 2]."""
        sums = every.unflatten(0, (-1, len(qkv))).sum(0)
        widths = (norm.weight.numel() * norm.ranks for norm in (self.query, self.key))
        return torch.stack([sums[..., part] / w for part, w in enumerate(widths)], dim=-1)

    def _both(self, queries: Tensor, keys: Tensor, numbers: Tensor) -> Any:
        """Each norm with its channels, and the number [S, B, 1] of each token that goes with it."""
        return (
            (self.query, queries, numbers[..., :1]),
            (self.key, keys, numbers[..., 1:]),
        )
