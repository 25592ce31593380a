"""Causal attention against torch's own, under autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_dhellam.kernels.attention import BACKENDS, Backend
from tests.kernels.checks import assert_close, drawn, truth

# sequence, batch, query heads, key heads, head size
SHAPES = {
    "one-head": (17, 2, 1, 1, 8),
    "grouped": (33, 3, 6, 2, 16),
    "one-group": (9, 1, 4, 1, 32),
    "single-token": (1, 2, 2, 2, 8),
}


def _backends(device: torch.device, dtype: torch.dtype) -> list[Backend]:
    if device.type == "cpu":
        return [BACKENDS["cpu"]()]
    names = ["efficient"] if dtype is torch.float32 else ["cudnn", "torch_flash", "efficient"]
    return [BACKENDS[name]() for name in names]


def _reference(scale: float) -> object:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).flatten(2)

    return attend


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(shape: str, dtype: torch.dtype, device: torch.device) -> None:
    s, b, h, g, d = SHAPES[shape]
    # Views into one fused tensor, as the operators hand them over.
    fused = drawn((s, b, h + 2 * g, d), dtype, device)
    q, k, v = fused.split([h, g, g], dim=2)
    dout = drawn((s, b, h * d), dtype, device, 1)
    scale = 1.3 * d**-0.5
    expected, grads = truth(_reference(scale), (q, k, v), dout)  # type: ignore[arg-type]
    for backend in _backends(device, dtype):
        out, lse, state = backend.forward(q, k, v, scale)
        dq, dk, dv = backend.backward(dout, q, k, v, out, lse, state, scale)
        assert out.dtype == dq.dtype == dk.dtype == dv.dtype == dtype
        assert lse.dtype == torch.float32
        actual = {"out": out, "dq": dq, "dk": dk, "dv": dv}
        wanted = dict(zip(actual, (expected, *grads), strict=True))
        if s == 1:  # One key: the scores cannot matter.
            for name in ("dq", "dk"):
                assert actual.pop(name).abs().max() < 1e-2 and wanted.pop(name).norm() < 1e-9
        # bf16 probabilities and gradients of repeated heads are rounded before they are summed.
        assert_close(actual, wanted, 2e-6 if dtype is torch.float32 else 1e-2)


def test_a_token_sees_nothing_of_later_ones(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = (drawn((16, 2, 2, 8), dtype, device, seed) for seed in range(3))
    for backend in _backends(device, dtype):
        out, _, _ = backend.forward(q, k, v, 0.3)
        k2, v2 = k.clone(), v.clone()
        k2[10:], v2[10:] = 5.0, -5.0
        other, _, _ = backend.forward(q, k2, v2, 0.3)
        assert torch.equal(out[:10], other[:10]) and not torch.equal(out[10:], other[10:])
