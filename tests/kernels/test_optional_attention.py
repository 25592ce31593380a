"""The backends of flash-attn and transformer-engine.

With the packages, on a GPU: their results. Without: what we make of their interfaces, against
stand-ins that have the published signatures and compute the same with torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dhellam.kernels import choose
from tests.kernels.checks import assert_close, drawn, truth

MODULES = {"flash_attn": "flash", "transformer_engine": "transformer_engine"}
CLASSES = {"flash_attn": "FlashAttention", "transformer_engine": "TransformerEngineAttention"}
SHAPE = 33, 3, 6, 2, 16
"""Sequence, batch, query heads, key heads, head size."""


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Causal attention on [B, heads, S, D]."""
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=True
    )


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Tensor:
    """The signature of flash-attn 2.8.3: [B, S, heads, D] to the same."""
    assert causal and dropout_p == 0 and not return_attn_probs
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return _attend(q, k, v, softmax_scale).transpose(1, 2)


class DotProductAttention(torch.nn.Module):
    """The arguments of transformer-engine 2.9 that have kept their names since: [S, B, heads, D]
    to [S, B, heads * D]."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.1,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__()
        assert attention_dropout == 0 and qkv_format == "sbhd" and attn_mask_type == "causal"
        self.sizes = num_attention_heads, num_gqa_groups, kv_channels
        self.scale = softmax_scale

    def forward(self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor) -> Tensor:
        assert self.sizes == (query_layer.shape[2], key_layer.shape[2], key_layer.shape[3])
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query_layer, key_layer, value_layer))
        return _attend(q, k, v, self.scale).permute(2, 0, 1, 3).flatten(2)


@pytest.fixture(params=list(MODULES))
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The backend, made from a stand-in for its package."""
    name: str = request.param
    package = ModuleType(name)
    if name == "flash_attn":
        package.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    else:
        pytorch = ModuleType(f"{name}.pytorch")
        pytorch.DotProductAttention = DotProductAttention  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"{name}.pytorch", pytorch)
    monkeypatch.setitem(sys.modules, name, package)
    path = f"lightning_dhellam.kernels.attention.{MODULES[name]}"
    monkeypatch.delitem(sys.modules, path, raising=False)
    yield getattr(importlib.import_module(path), CLASSES[name])()
    sys.modules.pop(path, None)


def _check(backend: Any, dtype: torch.dtype, device: torch.device, tolerance: float) -> None:
    s, b, h, g, d = SHAPE
    fused = drawn((s, b, h + 2 * g, d), dtype, device)
    q, k, v = fused.split([h, g, g], dim=2)
    dout, scale = drawn((s, b, h * d), dtype, device, 1), 1.3 * d**-0.5

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = _attend(*(t.permute(1, 2, 0, 3) for t in (q, k, v)), scale)
        return out.permute(2, 0, 1, 3).flatten(2)

    expected, grads = truth(reference, (q, k, v), dout)
    with torch.no_grad():
        out, lse, state = backend.forward(q, k, v, scale)
        assert not out.requires_grad and out.shape == (s, b, h * d)
        dq, dk, dv = backend.backward(dout, q, k, v, out, lse, state, scale)
    assert out.dtype == dq.dtype == dk.dtype == dv.dtype == dtype
    actual = {"out": out, "dq": dq, "dk": dk, "dv": dv}
    assert_close(actual, dict(zip(actual, (expected, *grads), strict=True)), tolerance)


def test_what_we_make_of_the_published_interface(stand_in: Any) -> None:
    _check(stand_in, torch.float32, torch.device("cpu"), 2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", list(MODULES))
def test_the_package_itself(name: str, dtype: torch.dtype) -> None:
    device = torch.device("cuda", 0)
    (obstacle,) = [w for n, w in choose.available("attention", device, dtype) if n == name]
    if obstacle is not None:
        pytest.skip(obstacle)
    backend = choose.choose(device, dtype, {"attention": name}).attention
    _check(backend, dtype, device, 2e-3 if dtype is torch.float16 else 1e-2)
