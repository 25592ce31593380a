"""The attention backends of flash-attn, flash-attn 3 and 4 and transformer-engine.

With the packages, on a GPU: their results, and cuDNN's beside them. Without: what we make of their
interfaces, against stand-ins that have the published signatures and compute the same with torch.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dhellam.kernels import choose
from lightning_dhellam.kernels.attention.heads import Heads
from lightning_dhellam.kernels.candidates import CANDIDATES
from lightning_dhellam.kernels.deterministic import deterministic
from tests.kernels.blocks import Shape as Blocks
from tests.kernels.blocks import check_blocks
from tests.kernels.checks import assert_close, drawn, truth

BACKENDS = {
    "flash_attn": ("flash", "FlashAttention"),
    "flash_attn_3": ("flash_attn_3", "FlashAttention3"),
    "flash_attn_4": ("flash_attn_4", "FlashAttention4"),
    "transformer_engine": ("transformer_engine", "TransformerEngineAttention"),
}
"""Module and class of each."""

WINDOWED = [name for name, one in CANDIDATES["attention"].items() if one.windows and name != "cpu"]
"""Those of GPUs that attend to a sliding window."""

Shape = tuple[int, int, Heads]
"""Sequence, batch, heads."""

SHAPES: dict[str, Shape] = {
    "less-than-a-block": (17, 2, Heads(groups=2, ratio=1, size=64)),
    "grouped": (257, 3, Heads(groups=2, ratio=3, size=64)),
    "ungrouped": (129, 2, Heads(groups=4, ratio=1, size=128)),
    "one-group": (1023, 1, Heads(groups=1, ratio=5, size=128)),
    "whole-blocks": (384, 2, Heads(groups=2, ratio=4, size=128)),
}

ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Largest relative error of one rounding."""


Window = tuple[int, int]
"""Keys before a token and after it, as packages are told: -1 for all."""
_ALL = (-1, -1)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: Window = _ALL) -> Tensor:
    """Causal attention on [B, heads, S, D]."""
    if window == _ALL:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scale, enable_gqa=True
        )
    assert window[0] >= 0 and window[1] == 0
    seen = q.new_ones(q.shape[2], q.shape[2], dtype=torch.bool).tril().triu(-window[0])
    return torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, scale=scale, enable_gqa=True
    )


def _attend_with_heads_last(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, window: Window
) -> Tensor:
    """The same on [B, S, heads, D]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return _attend(q, k, v, scale, window).transpose(1, 2)


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
    """The signature of flash-attn 2.8.3: [B, S, heads, D] to the same.

    flash-attn 3 has all of it that we use.
    """
    assert causal and dropout_p == 0 and not return_attn_probs
    assert deterministic is torch.are_deterministic_algorithms_enabled()
    return _attend_with_heads_last(q, k, v, softmax_scale, window_size)


def flash_attn_4_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, None, None, None]:
    """What we use of `_flash_attn_fwd` of flash-attn 4.0.0b36, on [B, S, heads, D]."""
    assert return_lse and softmax_scale is not None and out is not None
    assert out.shape == q.shape
    products, values = _products(q, k, v, softmax_scale, causal)
    out.copy_(torch.einsum("bhst,bthd->bshd", products.softmax(dim=-1), values))
    return out, products.logsumexp(dim=-1), None, None, None


def flash_attn_4_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    deterministic: bool = False,
) -> tuple[Tensor, ...]:
    """What we use of `_flash_attn_bwd` of flash-attn 4.0.0b36, on [B, S, heads, D].

    It takes the weights from `lse`, and what their gradients have in common from `out`.
    """
    assert deterministic is torch.are_deterministic_algorithms_enabled()
    assert softmax_scale is not None and lse.is_contiguous()
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        products, values = _products(*leaves, softmax_scale, causal)
        weights = (products - lse[..., None]).exp()
        given = torch.einsum("bhst,bthd->bshd", weights, values)
        common = (out * dout).sum(-1).transpose(1, 2)[..., None]
        loss = (given * dout).sum() - (weights * common).sum()
    return torch.autograd.grad(loss, leaves)


def _products(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """Masked scores [B, H, S, T], and the values of every query head."""
    keys, values = (t.repeat_interleave(q.shape[2] // k.shape[2], dim=2) for t in (k, v))
    products = torch.einsum("bshd,bthd->bhst", q, keys) * scale
    future = products.new_ones(products.shape[-2:], dtype=torch.bool).triu(1)
    return products.masked_fill(future & causal, -torch.inf), values


class DotProductAttention(torch.nn.Module):
    """What we use of transformer-engine 2.20.2: [S, B, heads, D] to [S, B, heads * D]."""

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        softmax_scale: float | None = None,
    ) -> None:
        super().__init__()
        assert attention_dropout == 0 and qkv_format == "sbhd" and attn_mask_type == "causal"
        self.sizes = num_attention_heads, num_gqa_groups, kv_channels
        self.scale, self.window = softmax_scale, window_size or _ALL
        self.deterministic = torch.are_deterministic_algorithms_enabled()

    def forward(self, query_layer: Tensor, key_layer: Tensor, value_layer: Tensor) -> Tensor:
        assert self.deterministic is torch.are_deterministic_algorithms_enabled()
        assert self.sizes == (query_layer.shape[2], key_layer.shape[2], key_layer.shape[3])
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query_layer, key_layer, value_layer))
        return _attend(q, k, v, self.scale, self.window).permute(2, 0, 1, 3).flatten(2)


STAND_INS: dict[str, dict[str, dict[str, Any]]] = {
    "flash_attn": {"flash_attn": {"flash_attn_func": flash_attn_func}},
    "flash_attn_3": {"flash_attn_interface": {"flash_attn_func": flash_attn_func}},
    "flash_attn_4": {
        "flash_attn": {},
        "flash_attn.cute": {},
        "flash_attn.cute.interface": {
            "_flash_attn_fwd": flash_attn_4_forward,
            "_flash_attn_bwd": flash_attn_4_backward,
        },
    },
    "transformer_engine": {
        "transformer_engine": {},
        "transformer_engine.pytorch": {"DotProductAttention": DotProductAttention},
    },
}
"""Modules of each package, and what is in them."""


@pytest.fixture(params=list(BACKENDS))
def stand_in(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The backend, made from a stand-in for its package."""
    for name, members in STAND_INS[request.param].items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    file, backend = BACKENDS[request.param]
    path = f"lightning_dhellam.kernels.attention.{file}"
    monkeypatch.delitem(sys.modules, path, raising=False)
    yield getattr(importlib.import_module(path), backend)()
    sys.modules.pop(path, None)


def _check(
    backend: Any,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    out_tolerance: float,
    grad_tolerance: float,
    window: int | None = None,
) -> None:
    told = _ALL if window is None else (window - 1, 0)
    s, b, heads = shape
    fused = drawn((s, b, (heads.queries + 2 * heads.groups) * heads.size), dtype, device)
    q, k, v = heads.split(fused)
    dout = drawn((s, b, heads.queries * heads.size), dtype, device, 1)
    scale = 1.3 * heads.size**-0.5

    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = _attend(*(t.permute(1, 2, 0, 3) for t in (q, k, v)), scale, told)
        return out.permute(2, 0, 1, 3).flatten(2)

    expected, expected_grads = truth(reference, (q, k, v), dout)
    with torch.no_grad():
        out, lse, state = backend.forward(q, k, v, scale, window=window)
        assert not out.requires_grad and out.is_contiguous()
        grads = backend.backward(dout, q, k, v, out, lse, state, scale, window=window)
    assert {t.dtype for t in (out, *grads)} == {dtype}
    names = "dq", "dk", "dv"
    assert_close({"out": out}, {"out": expected}, out_tolerance)
    assert_close(
        dict(zip(names, grads, strict=True)),
        dict(zip(names, expected_grads, strict=True)),
        grad_tolerance,
    )


@pytest.mark.parametrize("shape", ["less-than-a-block", "grouped"])
def test_what_we_make_of_the_published_interface(stand_in: Any, shape: str) -> None:
    takes_windows = CANDIDATES["attention"][stand_in.name].windows
    for ordered in (False, True):
        with deterministic() if ordered else nullcontext():
            for window in (None, 5) if takes_windows else (None,):
                cpu = torch.device("cpu")
                _check(stand_in, SHAPES[shape], torch.float32, cpu, 2e-6, 2e-6, window)


@pytest.mark.parametrize("stand_in", ["flash_attn_4"], indirect=True)
@pytest.mark.parametrize("queries", [24, 11], ids=["all", "the-later"])
def test_blocks_of_the_published_interface(stand_in: Any, queries: int) -> None:
    shape = Blocks(24, queries, 17, 2, Heads(2, 3, 16))
    check_blocks(stand_in, shape, torch.float32, torch.device("cpu"), 2e-6)


def _on_gpu(name: str, dtype: torch.dtype) -> Any:
    device = torch.device("cuda", 0)
    obstacle = dict(choose.available("attention", device, dtype))[name]
    if obstacle is not None:
        pytest.skip(obstacle)
    return choose.choose(device, dtype, {"attention": name}).attention


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(ROUNDING), ids=["fp16", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["cudnn", "torch_flash", *BACKENDS])
def test_results_on_a_gpu(name: str, shape: str, dtype: torch.dtype) -> None:
    # The output is rounded once after rounded probabilities; gradients of scores are rounded too,
    # and flash-attn 2 rounds those of keys once more before it adds up a group. Computed so in
    # float64, the errors are half of a rounding in the output and three quarters in the gradients.
    _check(
        _on_gpu(name, dtype),
        SHAPES[shape],
        dtype,
        torch.device("cuda", 0),
        0.8 * ROUNDING[dtype],
        1.3 * ROUNDING[dtype],
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", WINDOWED)
def test_windows_on_a_gpu(name: str) -> None:
    backend, dtype = _on_gpu(name, torch.bfloat16), torch.bfloat16
    limits = 0.8 * ROUNDING[dtype], 1.3 * ROUNDING[dtype]
    for window in (1 << 10, 100):
        _check(backend, SHAPES["grouped"], dtype, torch.device("cuda", 0), *limits, window)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [Heads(2, 4, 128), Heads(3, 1, 64)], ids=str)
@pytest.mark.parametrize("queries", [512, 256], ids=["all", "the-later"])
@pytest.mark.parametrize("name", ["cudnn", "torch_flash", "flash_attn_4"])
def test_blocks_on_a_gpu(name: str, queries: int, heads: Heads) -> None:
    # Merged outputs are rounded twice, and gradients by queries of two blocks are added.
    dtype = torch.bfloat16
    shape, limit = Blocks(512, queries, 1024, 2, heads), 2 * ROUNDING[dtype]
    check_blocks(_on_gpu(name, dtype), shape, dtype, torch.device("cuda", 0), limit)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["torch_flash", *BACKENDS])
def test_gradients_are_reproducible_where_torch_must_be(name: str) -> None:
    dtype, device, heads = torch.bfloat16, torch.device("cuda", 0), Heads(1, 8, 128)
    backend = _on_gpu(name, dtype)
    # Long enough for many blocks to add to the same rows at once.
    s, b = 4096, 1
    fused = drawn((s, b, (heads.queries + 2 * heads.groups) * heads.size), dtype, device)
    q, k, v = heads.split(fused)
    dout = drawn((s, b, heads.queries * heads.size), dtype, device, 1)
    runs = []
    with deterministic():
        for _ in range(3):
            out, lse, state = backend.forward(q, k, v, 0.1)
            runs.append((out, *backend.backward(dout, q, k, v, out, lse, state, 0.1)))
    for again in runs[1:]:
        assert [torch.equal(a, b) for a, b in zip(runs[0], again, strict=True)] == [True] * 4
