"""Plain torch: the ground truth, and the CPU path."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(tokens: Tensor, weight: Tensor, first: int) -> Tensor:
    """Rows of `weight` [V_rank, H], which holds the vocabulary from `first`, at `tokens` [B, S].

    Returns [S, B, H] with zeros where the token belongs to another rank.
    """
    rows, foreign = _rows(tokens.t(), weight, first)
    found = torch.nn.functional.embedding(rows, weight)
    return found.masked_fill_(foreign[..., None], 0)


def accumulate_wgrad(grad: Tensor, dy: Tensor, tokens: Tensor, first: int) -> None:
    """Add `dy` [S, B, H] to the rows `tokens` [B, S] of `grad` [V_rank, H], in place.

    Deterministic: `index_put_` sorts on CUDA, `index_add_` is serial on CPU.
    """
    rows, foreign = (found.flatten() for found in _rows(tokens.t(), grad, first))
    values = dy.to(grad.dtype).flatten(0, 1).masked_fill(foreign[:, None], 0)
    if grad.is_cuda:
        # Equal rows are added one after the other: zeros of foreign tokens go to different ones.
        anywhere = torch.arange(len(rows), device=rows.device) % len(grad)
        rows = torch.where(foreign, anywhere, rows)
        grad.index_put_((rows,), values, accumulate=True)
    else:
        grad.index_add_(0, rows, values)


def _rows(tokens: Tensor, weight: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """Row of each token, zero for those of other ranks, and which those are."""
    rows = tokens - first
    foreign = (rows < 0) | (rows >= weight.shape[0])
    return rows.masked_fill(foreign, 0), foreign
