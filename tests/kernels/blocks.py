"""Attention that is merged from two blocks of keys, against that over all of them at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_dhellam.kernels import merge
from lightning_dhellam.kernels.attention import Backend
from lightning_dhellam.kernels.attention.heads import Heads
from tests.kernels.checks import assert_close, drawn, truth


class Shape(NamedTuple):
    """Tokens attend to themselves, and the last ones to keys that are elsewhere.

    Attributes:
        tokens: that attend to themselves and those before them.
        queries: how many of them, the last ones, attend to the other keys.
        keys: the other keys.
        batch: samples.
        heads: of all.
    """

    tokens: int
    queries: int
    keys: int
    batch: int
    heads: Heads


def check_blocks(
    backend: Backend, shape: Shape, dtype: torch.dtype, device: torch.device, tolerance: float
) -> None:
    """The merged output, and the gradients of both blocks together, are those of the whole."""
    s, queries, other, b, heads = shape
    h, g, d = heads.queries, heads.groups, heads.size
    q = drawn((s, b, h, d), dtype, device)
    k, v = drawn((2, other + s, b, g, d), dtype, device, 1)
    dout = drawn((s, b, h * d), dtype, device, 2)
    scale, early = 1.3 * d**-0.5, s - queries
    sees = torch.ones(s, s, dtype=torch.bool, device=device).tril()
    elsewhere = (torch.arange(s, device=device) >= early)[:, None].expand(s, other)
    mask = torch.cat([elsewhere, sees], dim=1)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).flatten(2)

    expected, grads = truth(attend, (q, k, v), dout)
    own, far, late = (k[other:], v[other:]), (k[:other], v[:other]), slice(early, None)
    out, lse, state = backend.forward(q, *own, scale)
    more, more_lse, more_state = backend.forward(q[late], *far, scale, causal=False)
    out, lse = merge.forward(out, lse, more, more_lse, dtype)
    dq, *own_grads = backend.backward(dout, q, *own, out, lse, state, scale)
    part = (dout[late], q[late], *far, out[late], lse[..., late].contiguous())
    more_dq, *far_grads = backend.backward(*part, more_state, scale, causal=False)
    dq = dq.clone()
    dq[late] += more_dq
    dk, dv = (torch.cat(pair) for pair in zip(far_grads, own_grads, strict=True))
    actual = {"out": out, "dq": dq, "dk": dk, "dv": dv}
    assert_close(actual, dict(zip(actual, (expected, *grads), strict=True)), tolerance)
