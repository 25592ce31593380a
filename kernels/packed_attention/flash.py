"""Torch's own flash kernels in their variable-length form, called without autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.kernels.attention.sdpa import window_of
from lightning_dhellam.kernels.packed_attention.base import (
    PackedBackend,
    Runs,
    in_a_row,
    in_samples,
)

aten = torch.ops.aten
_AT_LEAST = 2
"""Queries of the longest document, as they are told: of one each, the kernels lay grouped queries
in a row as if every document had just one, which fails where some have none."""


class TorchFlash(PackedBackend):
    """Takes grouped keys as they are; its backward is ordered where torch has to be."""

    name = "torch_flash"

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        runs: Runs,
        *,
        causal: bool = True,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor, Any]:
        batch, most = q.shape[1], max(runs.longest, _AT_LEAST)
        out, lse, seed, unused, _ = aten._flash_attention_forward(
            *map(in_a_row, (q, k, v)), runs.queries, runs.keys, most, most, 0.0, causal, False,
            scale=scale, **window_of(window),
        )  # fmt: skip
        lse = lse.unflatten(1, (batch, -1)).transpose(0, 1)
        if not causal:  # of queries without keys it says +inf
            lse = torch.where(lse == torch.inf, -torch.inf, lse)
        return in_samples(out.flatten(1), batch).contiguous(), lse.contiguous(), (seed, unused)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        state: Any,
        scale: float,
        runs: Runs,
        *,
        causal: bool = True,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, most = q.shape[1], max(runs.longest, _AT_LEAST)
        dout, out = (t.unflatten(2, q.shape[2:]) for t in (dout, out))
        grads = aten._flash_attention_backward(
            *map(in_a_row, (dout, q, k, v, out)), lse.transpose(0, 1).flatten(1).contiguous(),
            runs.queries, runs.keys, most, most, 0.0, causal, *state, scale=scale,
            **window_of(window),
        )  # fmt: skip
        dq, dk, dv = (in_samples(grad, batch) for grad in grads)
        return dq, dk, dv
