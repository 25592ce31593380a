"""What the backends of each operator have in common: the functions that layers call, with types.

A backend is a module with these functions; what they compute is said once, in the operator's
reference. Shapes: S sequence, B batch, N tokens, H, I and O channels, V columns of a vocabulary; of
experts R or M rows, L groups of them, k choices of each token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lightning_dhellam.kernels.attention.heads import Heads
from lightning_dhellam.kernels.dropout.reference import Columns
from lightning_dhellam.kernels.fp8.reference import Block, Cast
from lightning_dhellam.kernels.permute import Sorted


class CrossEntropyKernel(Protocol):
    """Cross-entropy over a vocabulary that is split between ranks."""

    CHUNK: int

    def statistics(self, logits: Tensor, labels: Tensor, first: int, valid: int) -> Tensor:
        """Three numbers per token [3, N] of this rank's `logits` [N, V]."""

    def combine(self, statistics_of_ranks: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and log-sum-exp [N] of statistics [R, 3, N]."""

    def backward_(
        self, logits: Tensor, labels: Tensor, lse: Tensor, weights: Tensor, first: int, valid: int
    ) -> Tensor:
        """`logits` [N, V], overwritten by the gradient of the weighted loss."""


class DropoutKernel(Protocol):
    """Dropout whose mask follows from a key, and from the places [s] of the rows of a tensor.

    `columns` are for a tensor that has a part of each row: the first element, and how many all are.
    """

    def derive_key(self, key: int, *counters: int) -> int:
        """A new key from a key and counters."""

    def forward(
        self,
        x: Tensor,
        p: float,
        key: int,
        places: Tensor | None = None,
        columns: Columns = None,
    ) -> Tensor:
        """Drop elements of `x` [s, ...] with probability `p`, and scale the others."""

    def forward_add(
        self, x: Tensor, residual: Tensor, p: float, key: int, places: Tensor | None = None
    ) -> Tensor:
        """Add to `residual` what `forward` makes of `x`."""

    def backward(
        self,
        dy: Tensor,
        p: float,
        key: int,
        places: Tensor | None = None,
        columns: Columns = None,
    ) -> Tensor:
        """The gradient by `x`, from `dy`, that of what `forward` gave."""


class EmbeddingKernel(Protocol):
    """Look-up in a table [V, H] of which each rank holds a range of rows."""

    def forward(self, tokens: Tensor, weight: Tensor, first: int) -> Tensor:
        """Rows [S, B, H] of `tokens` [B, S], zero for those of other ranks."""

    def accumulate_wgrad(self, grad: Tensor, dy: Tensor, tokens: Tensor, first: int) -> None:
        """Add `dy` [S, B, H] to the rows of `grad` [V, H], in place."""


class Fp8Kernel(Protocol):
    """Matrices in 8 bits, and their products in a linear layer.

    Attributes:
        SHRINKS: whether its GEMMs leave processors free when `processors.leave` asks for it.
    """

    SHRINKS: bool

    def cast(
        self, x: Tensor, dtype: torch.dtype, block: Block = None, largest: Tensor | None = None
    ) -> tuple[Cast, Cast]:
        """`x` [..., C] as a matrix [N, C] of `dtype`, and turned, as `cast_rows` scales it."""

    def largest(self, x: Tensor) -> Tensor:
        """The largest absolute value of `x`, [1] in fp32."""

    def cast_rows(
        self, x: Tensor, dtype: torch.dtype, block: Block = None, largest: Tensor | None = None
    ) -> Cast:
        """`x` [..., C] as a matrix [N, C] of `dtype`; one scale is that of the `largest` [R]."""

    def turn(self, matrix: Cast) -> Cast:
        """`matrix` [N, C] turned, [C, P]."""

    def multiply(
        self,
        a: Cast,
        b: Cast,
        dtype: torch.dtype,
        bias: Tensor | None = None,
        *,
        fast: bool = False,
    ) -> Tensor:
        """`a` [M, K] times `b` [N, K] transposed, plus `bias` [N]."""

    def accumulate(self, grad: Tensor, a: Cast, b: Cast, *, first: bool = False) -> None:
        """Add `a` [M, K] times `b` [N, K] transposed to `grad` [M, N], in place."""


class GroupedKernel(Protocol):
    """The GEMMs of the linear layers of experts: each group of rows has a weight [O, I] of its own.

    Rows lie in order of their groups, up to `ends` [L] int32 on the device. `rows` are the sizes of
    the groups if the host knows them.

    Attributes:
        SHRINKS: whether its GEMMs leave processors free when `processors.leave` asks for it.
    """

    SHRINKS: bool

    def forward(
        self, x: Tensor, weights: Sequence[Tensor], ends: Tensor, rows: Sequence[int] | None = None
    ) -> Tensor:
        """[R, O] from `x` [R, I]."""

    def data_grad(
        self, dy: Tensor, weights: Sequence[Tensor], ends: Tensor, rows: Sequence[int] | None = None
    ) -> Tensor:
        """Gradient [R, I] by the input, from `dy` [R, O]."""

    def weight_grad(
        self,
        dy: Tensor,
        x: Tensor,
        grads: Sequence[Tensor],
        fresh: Sequence[bool],
        ends: Tensor,
        rows: Sequence[int] | None = None,
    ) -> None:
        """Add each weight's gradient to that of `grads` [O, I], or overwrite it if it is fresh."""

    def add_bias_(
        self,
        y: Tensor,
        biases: Sequence[Tensor],
        ends: Tensor,
        rows: Sequence[int] | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """Add to the rows of `y` [R, O] their group's bias [O], times a `scale` [R]."""

    def bias_grad(
        self,
        dy: Tensor,
        grads: Sequence[Tensor],
        fresh: Sequence[bool],
        ends: Tensor,
        rows: Sequence[int] | None = None,
        scale: Tensor | None = None,
    ) -> None:
        """Add each bias's gradient to that of `grads` [O], or overwrite it if it is fresh."""


class LinearKernel(Protocol):
    """The GEMMs of a linear layer with a weight [O, I] and perhaps a bias [O].

    Attributes:
        SHRINKS: whether its GEMMs leave processors free when `processors.leave` asks for it.
    """

    SHRINKS: bool

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., O] from `x` [..., I]."""

    def dgrad(self, dy: Tensor, weight: Tensor) -> Tensor:
        """Gradient [..., I] by the input."""

    def accumulate_wgrad(self, grad: Tensor, dy: Tensor, x: Tensor, *, first: bool = False) -> None:
        """Add the weight's gradient to `grad` [O, I], in place."""

    def accumulate_bias_grad(self, grad: Tensor, dy: Tensor, *, first: bool = False) -> None:
        """Add the bias's gradient to `grad` [O], in place."""


class ActivationKernel(Protocol):
    """An activation function of the MLP, and its gradient."""

    def forward(self, x: Tensor, /) -> Tensor:
        """The function of `x` [..., I]."""

    def backward(self, dy: Tensor, x: Tensor, /) -> Tensor:
        """The gradient by `x`, from `dy`, that of the function's value."""

    def forward_measured(self, x: Tensor, /) -> tuple[Tensor, Tensor]:
        """What `forward` gives, and the largest absolute values [R] of its parts in fp32."""

    def backward_measured(self, dy: Tensor, x: Tensor, /) -> tuple[Tensor, Tensor]:
        """What `backward` gives, and the same of it."""

    def weighted_forward(self, x: Tensor, weights: Tensor, /) -> Tensor:
        """The function of `x` [N, I], each row times its weight [N]."""

    def weighted_backward(self, dy: Tensor, x: Tensor, weights: Tensor, /) -> tuple[Tensor, Tensor]:
        """The gradients of that by `x` and by `weights`, the latter in fp32."""


class LayerNormKernel(Protocol):
    """LayerNorm, and the sum with the residual stream before it."""

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """`x` [..., H] normalised, and statistics."""

    def residual_forward(
        self, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of `x` and `residual`, and `forward` of it."""

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        statistics: Tensor,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients by `x`, plus `residual`, and by weight and bias."""


class MergeKernel(Protocol):
    """Attention over two blocks of keys made that over both."""

    def forward(
        self, out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Output [S, B, H*D] in `dtype` and log-sum-exp [B, H, S] over all keys.

        `other` [T, B, H*D] and its log-sum-exp [B, H, T] are of the last T queries.
        """


class PermuteKernel(Protocol):
    """Rows of tokens put in the order of their experts, and back. -1 is no row."""

    def sort(self, chosen: Tensor, groups: int) -> Sorted:
        """The choices [N, k] of tokens in order of the groups that they are."""

    def permute(self, x: Tensor, order: Tensor, place: Tensor | None = None) -> Tensor:
        """Rows `order` [M] of `x` [N, H], read once if their `place` [N, k] is given."""

    def unpermute(
        self, rows: Tensor, place: Tensor, weights: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        """Weighted sum [N, H] of the rows `place` [N, k] of `rows` [M, H], in `dtype`."""

    def unpermute_backward(
        self, dy: Tensor, rows: Tensor, order: Tensor, place: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Its gradients by `rows` and by `weights`, the latter in fp32."""


class RmsNormKernel(Protocol):
    """RMSNorm, and the sum with the residual stream before it."""

    def forward(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """`x` [..., H] normalised, and statistics."""

    def residual_forward(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The sum of `x` and `residual`, and `forward` of it."""

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        rstd: Tensor,
        residual: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Gradients by `x`, plus `residual`, and by the weight."""


class RopeKernel(Protocol):
    """Rotary position embedding, which puts heads in order on its way."""

    def forward(
        self, qkv: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, heads: Heads
    ) -> Tensor:
        """Rotated heads in the layout of `Heads.split`, from a projection [S, B, ...].

        Each token turns by the row of its position [S, B] in the tables.
        """

    def backward(
        self,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        positions: Tensor,
        cos: Tensor,
        sin: Tensor,
        heads: Heads,
    ) -> Tensor:
        """The gradient by the projection, from those by queries, keys and values."""
