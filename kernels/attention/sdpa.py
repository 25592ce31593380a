"""The kernels behind torch's scaled_dot_product_attention, called without autograd.

Shapes: S sequence, B batch, H query heads, G key and value heads, D head size. Arguments are
[S, B, heads, D] views; torch's kernels want [B, heads, S, D], which is a permutation of strides.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.kernels.attention.base import Backend

aten = torch.ops.aten
_BLOCK = 32
"""Tokens: rows of the memory-efficient kernel's log-sum-exp are a multiple of them."""
_ALIGNED = 16
"""Rows of its mask lie at multiples of so many numbers, as it wants them."""


class SdpaBackend(Backend):
    """One of torch's kernels, on permuted views of the arguments."""

    expands_groups = True
    """Whether keys and values must be repeated to as many heads as there are queries."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        *,
        causal: bool = True,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor, Any]:
        q, k, v = self._arrange(q, k, v)
        out, lse, state = self._forward(q, k, v, scale, causal, window)
        s, b = q.shape[2], q.shape[0]
        # The memory-efficient kernel lays out batches first, whatever it was given.
        return out.permute(2, 0, 1, 3).reshape(s, b, -1).contiguous(), lse, state

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
        *,
        causal: bool = True,
        window: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape, groups = q.shape, k.shape[2]
        dout, out = (t.view(shape).permute(1, 2, 0, 3) for t in (dout, out))
        q, k, v = self._arrange(q, k, v)
        grads = self._backward(dout, q, k, v, out, lse, state, scale, causal, window)
        return in_order(*grads, groups)

    def _arrange(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return arranged(q, k, v, expands_groups=self.expands_groups)

    @abstractmethod
    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None
    ) -> tuple[Tensor, Tensor, Any]:
        """Compute `forward` of arguments [B, heads, S, D]; the output lies so too."""

    @abstractmethod
    def _backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        state: Any,
        scale: float,
        causal: bool,
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute `backward` of arguments [B, heads, S, D]; the gradients lie so too."""


def arranged(
    q: Tensor, k: Tensor, v: Tensor, *, expands_groups: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Views [B, heads, S, D]; with keys and values for each query head where groups expand."""
    repeat = q.shape[2] // k.shape[2] if expands_groups else 1
    if repeat > 1:
        k, v = (t.repeat_interleave(repeat, dim=2) for t in (k, v))
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    return q, k, v


def in_order(dq: Tensor, dk: Tensor, dv: Tensor, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `arranged` has arranged, of gradients: [S, B, heads, D], those of keys by group."""
    dq, dk, dv = (grad.permute(2, 0, 1, 3) for grad in (dq, dk, dv))
    return dq, _sum_groups(dk, groups), _sum_groups(dv, groups)


def _sum_groups(grad: Tensor, groups: int) -> Tensor:
    """Add the gradients of repeated heads: [S, B, H, D] to [S, B, G, D]."""
    if grad.shape[2] == groups:
        return grad
    return grad.unflatten(2, (groups, -1)).sum(dim=3)


def window_of(window: int | None) -> dict[str, int]:
    """How torch's flash kernels are told: keys before a token and after it."""
    return {} if window is None else {"window_size_left": window - 1, "window_size_right": 0}


def bias_of(seen: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """What is added to scores [B, H, S, T]: nothing where a key is `seen` [B, S, T], else -inf."""
    b, s, t = seen.shape
    width = t + -t % _ALIGNED
    bias = torch.zeros(b, 1, s, width, dtype=dtype, device=seen.device)[..., :t]
    return bias.masked_fill_(~seen[:, None], -torch.inf).expand(b, heads, s, t)


def in_window(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Which queries see which keys, [S, T] bool: themselves and `window` - 1 before.

    The last query stands where the last key does.
    """
    seen, later = torch.ones(queries, keys, dtype=torch.bool, device=device), keys - queries
    return seen.tril(later).triu(later + 1 - window)


def _bias(q: Tensor, k: Tensor, window: int | None) -> Tensor | None:
    """What a window adds to the scores of queries [B, H, S, D]."""
    if window is None:
        return None
    seen = in_window(q.shape[2], k.shape[2], window, q.device).expand(len(q), -1, -1)
    return bias_of(seen, q.shape[1], q.dtype)


def _band(q: Tensor, k: Tensor, window: int | None) -> Tensor | None:
    """What a window adds to the scores of one head, [S, T]: for a kernel that repeats it itself."""
    if window is None:
        return None
    seen = in_window(q.shape[2], k.shape[2], window, q.device)
    return torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, -torch.inf)


def _heads_last(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, heads, S, D] as [B, S, heads, D], or the other way round."""
    return tuple(t.transpose(1, 2) for t in tensors)


class CpuFlash(SdpaBackend):
    """Torch's blocked CPU kernel."""

    name = "cpu"

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None
    ) -> tuple[Tensor, Tensor, Any]:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal and window is None, attn_mask=_band(q, k, window), scale=scale
        )
        return out, lse, None

    def _backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        state: Any,
        scale: float,
        causal: bool,
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, causal and window is None,
            attn_mask=_band(q, k, window), scale=scale,
        )  # fmt: skip
        return dq, dk, dv


class CudnnAttention(SdpaBackend):
    """cuDNN: on an H200 twice the rate of the flash backend (390-585 TFLOP/s forward, D 128)."""

    name = "cudnn"
    # Measured at S 8192, 32 heads on 8, D 128: forward 0.89 ms instead of 1.05, backward 2.65
    # instead of 2.80, and nothing to add up afterwards.
    expands_groups = False

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None
    ) -> tuple[Tensor, Tensor, Any]:
        assert window is None, f"{self.name} takes no window"
        out, lse, *rest = aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, causal, False, scale=scale
        )
        return out, lse.view(q.shape[:3]), rest[:6]

    def _backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        state: Any,
        scale: float,
        causal: bool,
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if causal and q.shape[2] == 1:
            # A single token attends to itself alone, which cuDNN does not take.
            grouped = dout.unflatten(1, (v.shape[1], -1)).float().sum(dim=2).to(v.dtype)
            return torch.zeros_like(q), torch.zeros_like(k), grouped
        cum_q, cum_k, max_q, max_k, seed, offset = state
        dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse[..., None], seed, offset, None, cum_q, cum_k, max_q, max_k,
            0.0, causal, scale=scale,
        )  # fmt: skip
        return dq, dk, dv


class TorchFlash(SdpaBackend):
    """Torch's own flash kernels: half of cuDNN's rate, but a backward that can be ordered."""

    name = "torch_flash"

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None
    ) -> tuple[Tensor, Tensor, Any]:
        if window is not None:
            out, lse, seed, unused, _ = aten._flash_attention_forward(
                *_heads_last(q, k, v), None, None, q.shape[2], k.shape[2], 0.0, causal, False,
                scale=scale, **window_of(window),
            )  # fmt: skip
            return out.transpose(1, 2), lse, (seed, unused)
        out, lse, *rest = aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal, False, scale=scale
        )
        return out, lse, rest[:6]

    def _backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        state: Any,
        scale: float,
        causal: bool,
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if window is not None:
            grads = aten._flash_attention_backward(
                *_heads_last(dout, q, k, v, out), lse, None, None, q.shape[2], k.shape[2], 0.0,
                causal, *state, scale=scale, **window_of(window),
            )  # fmt: skip
            dq, dk, dv = _heads_last(*grads)
            return dq, dk, dv
        cum_q, cum_k, max_q, max_k, seed, offset = state
        dq, dk, dv = aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, causal, seed, offset,
            scale=scale,
        )  # fmt: skip
        return dq, dk, dv


class EfficientAttention(SdpaBackend):
    """Torch's memory-efficient kernel: fp32 on CUDA, which cuDNN does not take."""

    name = "efficient"

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, window: int | None
    ) -> tuple[Tensor, Tensor, Any]:
        out, lse, seed, offset = aten._scaled_dot_product_efficient_attention(
            q, k, v, _bias(q, k, window), True, 0.0, causal and window is None, scale=scale
        )
        return out, lse[..., : q.shape[2]], (seed, offset)

    def _backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        state: Any,
        scale: float,
        causal: bool,
        window: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        causal = causal and window is None
        bias = _bias(q, k, window)
        return efficient_gradients(dout, q, k, v, bias, out, lse, state, scale, causal)


def efficient_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    out: Tensor,
    lse: Tensor,
    state: Any,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by queries, keys and values of the memory-efficient kernel.

    Args:
        dout: by the output, which is [B, heads, S, D] as all others are.
        q: queries.
        k: keys.
        v: values.
        bias: what was added to scores [B, heads, S, T]; None where nothing was.
        out: the output, in whatever order it lies.
        lse: [B, heads, S].
        state: seed and offset of forward.
        scale: factor on the scores.
        causal: whether tokens see none of those behind them.
    """
    # The kernel takes for granted that it lies as forward's does, and looks at no stride.
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    # Rows of whole blocks, as forward makes them: what is beyond the sequence counts nothing.
    padded = torch.nn.functional.pad(lse, (0, -q.shape[2] % _BLOCK), value=torch.inf)
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, bias, out, padded, *state, 0.0, (True, True, True, False), causal,
        scale=scale,
    )  # fmt: skip
    return dq, dk, dv


BACKENDS: dict[str, type[SdpaBackend]] = {
    backend.name: backend for backend in (CpuFlash, CudnnAttention, TorchFlash, EfficientAttention)
}
