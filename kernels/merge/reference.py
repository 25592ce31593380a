"""Plain torch: the ground truth, and the CPU path. Everything is computed in fp32.

Each block of keys has given an output, whose weights add up to 1, and the logarithm of what they
were divided by. So over both blocks the output is their mean, weighted by those divisors.
"""

from __future__ import annotations

import torch
from torch import Tensor


def forward(
    out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Merge `out` [S, B, H*D] and `lse` [B, H, S] with those of other keys, of the last T queries.

    The first S - T queries attend to none of the other keys, and stay as they are. A query that
    attends to no key of a block has a log-sum-exp of -inf there.

    Args:
        out: attention of all queries over some keys.
        lse: log-sum-exp of their scores, in fp32.
        other: [T, B, H*D], over the other keys.
        other_lse: [B, H, T] in fp32.
        dtype: of the merged output; its log-sum-exp is in fp32.
    """
    start, heads = out.shape[0] - other.shape[0], lse.shape[1]
    late = lse[..., start:]
    total = torch.logaddexp(late, other_lse)
    origin = torch.where(total == -torch.inf, 0.0, total)  # -inf - -inf is NaN
    merged = _weighted(out[start:], (late - origin).exp(), heads)
    merged += _weighted(other, (other_lse - origin).exp(), heads)
    whole = torch.cat([out[:start], merged.to(dtype)]) if start else merged.to(dtype)
    return whole.to(dtype), torch.cat([lse[..., :start], total], dim=-1)


def _weighted(out: Tensor, weights: Tensor, heads: int) -> Tensor:
    """`out` [S, B, H*D] in fp32, each head of each token times its weight of [B, H, S]."""
    wide = out.float().unflatten(2, (heads, -1))
    return (wide * weights.permute(2, 0, 1)[..., None]).flatten(2)
