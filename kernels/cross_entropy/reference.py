"""Plain torch: the ground truth, and the CPU path.

Each rank reduces its logits to three numbers per token, which are all that ranks exchange: the
maximum, the sum of exponentials relative to it, and the logit of the label where this rank has
it. Shapes: N tokens, V the columns of this rank of which the first `valid` are real vocabulary
(the rest pads), R ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1024
"""Tokens in fp32 at a time: 0.5 GB at 128,256 columns, and still a full GPU."""


def statistics(logits: Tensor, labels: Tensor, first: int, valid: int) -> Tensor:
    """Maximum, sum of exponentials and label logit of `logits` [N, V] at `labels` [N].

    `first` is the vocabulary index of column 0. Returns [3, N] in fp32.
    """
    out = torch.empty(3, logits.shape[0], dtype=torch.float32, device=logits.device)
    if valid <= 0:
        out[0].fill_(-torch.inf)
        out[1:].zero_()
        return out
    for rows in _chunks(logits.shape[0]):
        wide = logits[rows, :valid].float()
        column, foreign = _columns(labels[rows], first, valid)
        out[2, rows] = wide.gather(1, column).squeeze(1).masked_fill_(foreign, 0)
        top = wide.amax(dim=1)
        out[0, rows] = top
        out[1, rows] = wide.sub(top[:, None]).exp_().sum(dim=1)
    return out


def combine(statistics_of_ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Loss per token and log-sum-exp, each [N] in fp32, from statistics [R, 3, N]."""
    top, total, label = statistics_of_ranks.unbind(dim=1)
    highest = top.amax(dim=0)
    lse = highest + (total * (top - highest).exp()).sum(dim=0).log()
    return lse - label.sum(dim=0), lse


def backward_(
    logits: Tensor, labels: Tensor, lse: Tensor, weights: Tensor, first: int, valid: int
) -> Tensor:
    """Overwrite `logits` [N, V] by the gradient of `sum(weights * loss)`, and return it."""
    valid = max(valid, 0)
    for rows in _chunks(logits.shape[0]):
        wide = logits[rows, :valid].float().sub_(lse[rows, None]).exp_()
        if valid:
            column, foreign = _columns(labels[rows], first, valid)
            # One column of each row: not scatter_add_, which is not deterministic on CUDA.
            here = wide.gather(1, column) + foreign.to(wide.dtype).sub_(1)[:, None]
            wide.scatter_(1, column, here)
        logits[rows, :valid] = wide.mul_(weights[rows, None]).to(logits.dtype)
    logits[:, valid:].zero_()
    return logits


def _chunks(tokens: int) -> list[slice]:
    return [slice(i, min(i + CHUNK, tokens)) for i in range(0, tokens, CHUNK)]


def _columns(labels: Tensor, first: int, valid: int) -> tuple[Tensor, Tensor]:
    """Column [n, 1] of each label, zero for those of other ranks, and which those are."""
    column = labels - first
    foreign = (column < 0) | (column >= valid)
    return column.masked_fill(foreign, 0)[:, None], foreign
