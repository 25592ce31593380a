"""Attention of a whole sample with a mask: for types that no variable-length kernel computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.kernels.attention.sdpa import (
    arranged,
    bias_of,
    efficient_gradients,
    in_order,
)
from lightning_dhellam.kernels.packed_attention.base import PackedBackend, Runs

aten = torch.ops.aten


class Efficient(PackedBackend):
    """Torch's memory-efficient kernel: fp32 on CUDA. Its mask takes S * T numbers of a sample."""

    name = "efficient"

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
        s, b, h, _ = q.shape
        seen = sees(runs, s, k.shape[0], b, causal=causal, window=window)
        alone = ~seen.any(dim=2)
        # Softmax of nothing is NaN: who sees nothing is shown everything, and then none of it.
        q, k, v = arranged(q, k, v)
        out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
            q, k, v, bias_of(seen | alone[..., None], h, q.dtype), True, 0.0, False, scale=scale
        )
        lse = lse[..., :s].masked_fill(alone[:, None], -torch.inf)
        out = out.masked_fill(alone[:, None, :, None], 0.0)
        return out.permute(2, 0, 1, 3).reshape(s, b, -1), lse, (seed, offset)

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
        shape, groups = q.shape, k.shape[2]
        seen = sees(runs, shape[0], len(k), shape[1], causal=causal, window=window)
        bias = bias_of(seen, shape[2], q.dtype)
        dout, out = (t.view(shape).permute(1, 2, 0, 3) for t in (dout, out))
        q, k, v = arranged(q, k, v)
        grads = efficient_gradients(dout, q, k, v, bias, out, lse, state, scale, causal=False)
        return in_order(*grads, groups)


def sees(
    runs: Runs, queries: int, keys: int, batch: int, *, causal: bool, window: int | None = None
) -> Tensor:
    """Which queries see which keys: [B, S, T] bool, made where the tensors are."""
    numbers = [
        torch.searchsorted(
            ends[1:], torch.arange(batch * count, device=ends.device, dtype=ends.dtype), right=True
        ).view(batch, count)
        for ends, count in ((runs.queries, queries), (runs.keys, keys))
    ]
    seen = numbers[0][:, :, None] == numbers[1][:, None]
    later = keys - queries  # with a window the last query stands where the last key does
    seen = seen.tril(later) if causal else seen
    return seen if window is None else seen.triu(later + 1 - window)
