"""Plain torch: the ground truth, and the CPU path. The rotation is in fp32.

Each token turns by the row of its position in tables `cos` and `sin` [L, D].

Shapes: S sequence, L positions, B batch, G query groups, R queries of a group, D head size,
H = G * R heads. `Heads` says how they lie.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_dhellam.kernels.attention.heads import Heads


def forward(qkv: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, heads: Heads) -> Tensor:
    """Rotate queries and keys of `qkv` [S, B, G*(R+2)*D] by their `positions` [S, B].

    Returns [S, B, (H+2G)*D] with all queries first, then all keys, then all values, so that each
    of them is one strided view (`Heads.split`).
    """
    s, b, _ = qkv.shape
    grouped = qkv.view(s, b, heads.groups, heads.ratio + 2, heads.size)
    out = qkv.new_empty(s, b, heads.channels)
    q_out, k_out, v_out = heads.split(out)
    cos, sin = _of_heads(cos, positions), _of_heads(sin, positions)
    q = grouped[..., : heads.ratio, :].reshape(s, b, heads.queries, heads.size)
    q_out.copy_(_rotate(q, cos, sin))
    k_out.copy_(_rotate(grouped[..., heads.ratio, :], cos, sin))
    v_out.copy_(grouped[..., heads.ratio + 1, :])
    return out


def backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: Heads,
) -> Tensor:
    """Gradient of `forward` [S, B, G*(R+2)*D] from `dq` [S, B, H, D], `dk`, `dv` [S, B, G, D]."""
    s, b = dq.shape[:2]
    cos, sin = _of_heads(cos, positions), _of_heads(sin, positions)
    dqkv = dq.new_empty(s, b, heads.groups, heads.ratio + 2, heads.size)
    dqkv[..., : heads.ratio, :].copy_(
        _rotate(dq, cos, -sin).view(s, b, heads.groups, heads.ratio, heads.size)
    )
    dqkv[..., heads.ratio, :].copy_(_rotate(dk, cos, -sin))
    dqkv[..., heads.ratio + 1, :].copy_(dv)
    return dqkv.view(s, b, -1)


def _of_heads(table: Tensor, positions: Tensor) -> Tensor:
    """The rows of each token, for all of its heads: [S, B, 1, D]."""
    return table[positions].unsqueeze(2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of the last dimension of `x` [S, B, heads, D] against each other.

    `cos` and `sin` are [S, B, 1, D].
    """
    wide = x.float()
    first, second = wide.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (wide * cos + turned * sin).to(x.dtype)
