"""Plain torch: a loop over the groups. The ground truth, and the CPU path.

Shapes: R rows in order of their groups, L groups, I input and O output channels. Group g has the
rows from `ends[g - 1]` to `ends[g]`, perhaps none, and a weight [O, I] of its own. `ends` [L] int32
lies where the rows do, and the last is R at most. `rows` are the sizes of the groups where the host
knows them: without them it has to wait for `ends` here. Rows behind the last end belong to no
group, and results have no values there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from lightning_dhellam.kernels import linear
from lightning_dhellam.kernels.linear import cublas

SHRINKS = True
"""Its GEMMs on CUDA are cuBLAS's."""


def forward(
    x: Tensor, weights: Sequence[Tensor], ends: Tensor, rows: Sequence[int] | None = None
) -> Tensor:
    """Rows `x` [R, I] times the weight [O, I] of their group, transposed. Returns [R, O]."""
    y = x.new_empty(len(x), weights[0].shape[0])
    for part, weight in zip(parts(ends, rows), weights, strict=True):
        torch.mm(x[part], weight.detach().t(), out=y[part])
    return y


def data_grad(
    dy: Tensor, weights: Sequence[Tensor], ends: Tensor, rows: Sequence[int] | None = None
) -> Tensor:
    """Gradient by the input [R, I] from `dy` [R, O]."""
    dx = dy.new_empty(len(dy), weights[0].shape[1])
    for part, weight in zip(parts(ends, rows), weights, strict=True):
        torch.mm(dy[part], weight.detach(), out=dx[part])
    return dx


def weight_grad(
    dy: Tensor,
    x: Tensor,
    grads: Sequence[Tensor],
    fresh: Sequence[bool],
    ends: Tensor,
    rows: Sequence[int] | None = None,
) -> None:
    """Add each group's `dy` [R, O] transposed times `x` [R, I] to its gradient [O, I], in place.

    What a gradient that is `fresh` holds is overwritten without being read: with zeros where its
    group has no rows.
    """
    accumulate_wgrad = cublas.accumulate_wgrad if dy.is_cuda else linear.accumulate_wgrad
    for part, grad, first in zip(parts(ends, rows), grads, fresh, strict=True):
        if part.start < part.stop:
            accumulate_wgrad(grad, dy[part], x[part], first=first)
        elif first:
            grad.zero_()


def add_bias_(
    y: Tensor,
    biases: Sequence[Tensor],
    ends: Tensor,
    rows: Sequence[int] | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Add to each row of `y` [R, O] the bias [O] of its group, times the row's `scale` [R]."""
    for part, bias in zip(parts(ends, rows), biases, strict=True):
        if scale is None:
            y[part] += bias.detach()
        else:
            y[part] = (y[part] + bias.detach() * scale[part, None]).to(y.dtype)
    return y


def bias_grad(
    dy: Tensor,
    grads: Sequence[Tensor],
    fresh: Sequence[bool],
    ends: Tensor,
    rows: Sequence[int] | None = None,
    scale: Tensor | None = None,
) -> None:
    """Add each group's rows of `dy` [R, O], times their `scale` [R], to its gradient [O], in place.

    Those that are `fresh` are overwritten, as weights' are.
    """
    for part, grad, first in zip(parts(ends, rows), grads, fresh, strict=True):
        scaled = dy[part] if scale is None else dy[part] * scale[part, None]
        linear.accumulate_bias_grad(grad, scaled, first=first)


def parts(ends: Tensor, rows: Sequence[int] | None) -> Iterator[slice]:
    """The rows of each group."""
    last = ends.tolist() if rows is None else accumulate(rows)
    return (slice(start, end) for start, end in pairwise((0, *last)))
