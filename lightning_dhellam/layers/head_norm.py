"""Norms of each head's queries and keys as one operator in each direction (Qwen3's QK-norm).

    forward   qkv  head_norm  (rope)  attention
    backward  attention  (rope)  head_norm  qkv

Tensor-parallel ranks have some of the heads each and the whole weights, so that each adds its part
of their gradients, as a norm does that sees some of the tokens. A norm of all heads together is the
same on one rank, and another where several share them: `wide_norm`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_dhellam.kernels.attention.heads import Heads
from lightning_dhellam.kernels.choose import Kernels
from lightning_dhellam.layers.norm import Norm
from lightning_dhellam.layers.rules import on_tp
from lightning_dhellam.layers.wide_norm import SharedNorm, WideNorm
from lightning_dhellam.layers.writer import GraphWriter
from lightning_dhellam.plan.layout import Held


@dataclass(frozen=True)
class HeadNorm:
    """The two norms of attention's heads, in the layout that the projection leaves.

    Attributes:
        query: of each head's queries [D].
        key: of each head's keys [D].
        heads: of this rank.
        is_wide: whether it is of all heads together [H * D].
    """

    query: Norm
    key: Norm
    heads: Heads
    is_wide: bool = False

    @classmethod
    def of(
        cls, module: Any, heads: Heads, kernels: Kernels, index: int
    ) -> HeadNorm | SharedNorm | None:
        """What lowers the norms of a `SelfAttention`; None where it has none.

        Raises:
            ValueError: there is one of the two only, or it is no norm of each head alone.
        """
        found = {name: getattr(module, f"{name}_layernorm", None) for name in ("q", "k")}
        if all(norm is None for norm in found.values()):
            return None
        for name, norm in found.items():
            if norm is None:
                raise ValueError(
                    f"layer {index}: its attention has no {name}_layernorm, but the other: give its"
                    " spec both, or none"
                )
            if isinstance(norm, WideNorm):
                continue
            width = getattr(getattr(norm, "weight", None), "numel", lambda: heads.size)()
            if width != heads.size:
                raise ValueError(
                    f"layer {index}: its {name}_layernorm is of {width} channels, which has no"
                    f" lowering: use a norm of one head's {heads.size}"
                )
        where, query, key = f"layer {index}", found["q"], found["k"]
        if isinstance(query, WideNorm) != isinstance(key, WideNorm):
            raise ValueError(
                f"layer {index}: its attention has a norm of all heads together, and another of"
                " each: give its spec two of a kind"
            )
        lowered = cls(
            Norm.of(query, "query", kernels, where),
            Norm.of(key, "key", kernels, where),
            heads,
            isinstance(query, WideNorm),
        )
        if isinstance(query, WideNorm) and isinstance(key, WideNorm) and query.ranks > 1:
            return SharedNorm(query, key, heads, lowered._cut, lowered._join)
        return lowered

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Weights and, of LayerNorms, biases."""
        return self.query.parameters + self.key.parameters

    def forward(self, w: GraphWriter, read: str, write: str) -> None:
        """Add `write`, queries and keys of `read` [S, B, G*(R+2)*D] normalised, with its values."""

        def run(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            queries, keys, values = self._cut(qkv)
            normed, query_statistics = self.query.normalise(self._whole(queries))
            normed_keys, key_statistics = self.key.normalise(self._whole(keys))
            found = self._join(normed.view_as(queries), normed_keys.view_as(keys), values)
            return found, query_statistics, key_statistics

        size = w.sizes.wide(self.heads.channels)
        numbers = 4 * len(self.query.parameters)
        of_queries, of_keys = (1, 1) if self.is_wide else (self.heads.queries, self.heads.groups)
        w.compute(
            "head_norm",
            (read,),
            {
                write: size,
                "query_rstd": numbers * of_queries,
                "key_rstd": numbers * of_keys,
            },
            run,
            moved=2 * size,
            rule=on_tp(Held.HEADS, Held.HEADS),
        )

    def backward(self, w: GraphWriter, grad: str, read: str, write: str) -> None:
        """Add the gradient by `read`, from `grad` of what `forward` wrote, and of the weights."""

        def run(grad: Tensor, qkv: Tensor, of_queries: Tensor, of_keys: Tensor) -> Tensor:
            queries, keys, _ = self._cut(qkv)
            d_queries, d_keys, d_values = self._cut(grad)
            by_queries, by_keys = (
                norm.gradient(self._whole(dy), self._whole(x), statistics).view_as(x)
                for norm, dy, x, statistics in (
                    (self.query, d_queries, queries, of_queries),
                    (self.key, d_keys, keys, of_keys),
                )
            )
            return self._join(by_queries, by_keys, d_values)

        size = w.sizes.wide(self.heads.channels)
        w.compute(
            "head_norm.grad",
            (grad, read, "query_rstd", "key_rstd"),
            {write: size},
            run,
            moved=3 * size,
            accumulates=self.parameters,
            rule=on_tp(Held.HEADS, Held.HEADS, gradient=Held.PARTIAL),
        )

    def _whole(self, heads: Tensor) -> Tensor:
        """Heads [S, B, G, ., D] with the channels last that a norm takes together."""
        return heads.reshape(*heads.shape[:2], -1) if self.is_wide else heads.contiguous()

    def _cut(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [S, B, G, R, D], keys and values [S, B, G, 1, D], as views."""
        heads = self.heads
        grouped = qkv.view(*qkv.shape[:2], heads.groups, heads.ratio + 2, heads.size)
        queries, keys, values = grouped.split([heads.ratio, 1, 1], dim=3)
        return queries, keys, values

    def _join(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """What `_cut` takes apart."""
        return torch.cat([queries, keys, values], dim=3).flatten(2)
