"""Plain torch, a few queries at a time: the ground truth, and what runs on every device.

Scores and weights are in fp32, as the fast kernels of attention have them inside.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_dhellam.kernels.attention.sdpa import arranged, in_order
from lightning_dhellam.kernels.dropped_attention.base import DroppingBackend, Drops
from lightning_dhellam.kernels.packed_attention.base import Runs
from lightning_dhellam.kernels.packed_attention.masked import sees

_AT_ONCE = 1 << 22
"""Weights that are in memory at the same time; backward has six tensors of as many."""


class Reference(DroppingBackend):
    """Scores and weights of some queries after the other."""

    name = "reference"

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        drops: Drops,
        runs: Runs | None = None,
        *,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor]:
        s, b, h, _ = q.shape
        unseen = _unseen(q, k, runs, causal)
        queries, keys, values = (x.float() for x in arranged(q, k, v))
        out, lse = torch.empty_like(queries), queries.new_empty(b, h, s)
        for rows in _pieces(queries, keys):
            scores = _scores(queries, keys, scale, unseen, rows)
            lse[:, :, rows] = scores.logsumexp(dim=3)
            weights = _weights(scores, lse[:, :, rows])
            out[:, :, rows] = (weights * drops.factors(weights, rows)) @ values
        return out.permute(2, 0, 1, 3).reshape(s, b, -1).to(q.dtype), lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
        drops: Drops,
        runs: Runs | None = None,
        *,
        causal: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        groups, unseen = k.shape[2], _unseen(q, k, runs, causal)
        grads, outs = (x.view(q.shape).permute(1, 2, 0, 3).float() for x in (dout, out))
        queries, keys, values = (x.float() for x in arranged(q, k, v))
        # What a score's growth takes from all weights of its query: of dropped ones as well.
        taken = (grads * outs).sum(dim=3, keepdim=True)
        dq, dk, dv = (torch.zeros_like(x) for x in (queries, keys, values))
        for rows in _pieces(queries, keys):
            weights = _weights(_scores(queries, keys, scale, unseen, rows), lse[:, :, rows])
            factors = drops.factors(weights, rows)
            grad = grads[:, :, rows]
            dv += (weights * factors).transpose(2, 3) @ grad
            d_weights = (grad @ values.transpose(2, 3)) * factors
            d_scores = weights * (d_weights - taken[:, :, rows]) * scale
            dq[:, :, rows] = d_scores @ keys
            dk += d_scores.transpose(2, 3) @ queries[:, :, rows]
        dq, dk, dv = in_order(dq, dk, dv, groups)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _pieces(queries: Tensor, keys: Tensor) -> Iterator[slice]:
    """Queries [B, H, S, D] that are attended with at the same time."""
    batch, heads, count, _ = queries.shape
    step = max(1, _AT_ONCE // (batch * heads * keys.shape[2]))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _unseen(q: Tensor, k: Tensor, runs: Runs | None, causal: bool) -> Tensor | None:
    """Which queries do not see which keys, [B, S, T] or for all samples [1, S, T]; None if none."""
    s, t = len(q), len(k)
    if runs is not None:
        return ~sees(runs, s, t, q.shape[1], causal=causal)
    if not causal:
        return None
    return torch.ones(1, s, t, dtype=torch.bool, device=q.device).triu(1)


def _scores(
    queries: Tensor, keys: Tensor, scale: float, unseen: Tensor | None, rows: slice
) -> Tensor:
    """[B, H, rows, T], -inf where a key is not seen."""
    scores = (queries[:, :, rows] * scale) @ keys.transpose(2, 3)
    return scores if unseen is None else scores.masked_fill_(unseen[:, None, rows], -torch.inf)


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """Softmax [B, H, rows, T] by the log-sum-exp [B, H, rows]: nothing where no key is seen."""
    return torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
