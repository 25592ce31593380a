"""Causal attention against torch's own, under autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_dhellam.kernels.attention import BACKENDS, Backend
from lightning_dhellam.kernels.attention.heads import Heads
from lightning_dhellam.kernels.candidates import CANDIDATES
from tests.kernels.blocks import Shape, check_blocks
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


def _reference(scale: float, window: int | None = None) -> object:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        seen = torch.ones(len(q[0, 0]), len(k[0, 0]), dtype=torch.bool, device=q.device).tril()
        if window is not None:
            seen = seen.triu(1 - window)
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, scale=scale, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).flatten(2)

    return attend


@pytest.mark.parametrize("window", [None, 1, 7, 100])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients(
    shape: str, window: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    s, b, h, g, d = SHAPES[shape]
    # Views into one fused tensor, as the operators hand them over.
    fused = drawn((s, b, h + 2 * g, d), dtype, device)
    q, k, v = fused.split([h, g, g], dim=2)
    dout = drawn((s, b, h * d), dtype, device, 1)
    scale = 1.3 * d**-0.5
    expected, grads = truth(_reference(scale, window), (q, k, v), dout)  # type: ignore[arg-type]
    for backend in _backends(device, dtype):
        if window is not None and not CANDIDATES["attention"][backend.name].windows:
            continue
        out, lse, state = backend.forward(q, k, v, scale, window=window)
        grads_of = (dout, q, k, v, out, lse, state, scale)
        dq, dk, dv = backend.backward(*grads_of, window=window)
        assert out.dtype == dq.dtype == dk.dtype == dv.dtype == dtype
        assert lse.dtype == torch.float32
        actual = {"out": out, "dq": dq, "dk": dk, "dv": dv}
        wanted = dict(zip(actual, (expected, *grads), strict=True))
        if s == 1 or window == 1:  # One key: the scores cannot matter.
            for name in ("dq", "dk"):
                assert actual.pop(name).abs().max() < 1e-2 and wanted.pop(name).norm() < 1e-9
        # bf16 probabilities and gradients of repeated heads are rounded before they are summed.
        assert_close(actual, wanted, 2e-6 if dtype is torch.float32 else 1e-2)


@pytest.mark.parametrize("window", [1, 7, 100])
def test_with_a_window_fewer_queries_stand_where_the_last_keys_do(
    window: int, dtype: torch.dtype, device: torch.device
) -> None:
    q, k, v = (drawn((48, 2, heads, 16), dtype, device, heads) for heads in (4, 2, 2))
    dout = drawn((48, 2, 64), dtype, device, 1)
    dout[:29] = 0
    for backend in _backends(device, dtype):
        if not CANDIDATES["attention"][backend.name].windows or not backend.gives_lse:
            continue
        out, lse, state = backend.forward(q, k, v, 0.3, window=window)
        grads = backend.backward(dout, q, k, v, out, lse, state, 0.3, window=window)
        some, some_lse, state = backend.forward(q[29:], k, v, 0.3, window=window)
        read = (dout[29:], q[29:], k, v, some, some_lse.contiguous(), state, 0.3)
        dq, dk, dv = backend.backward(*read, window=window)
        actual = {"out": some, "lse": some_lse, "dq": dq, "dk": dk, "dv": dv}
        wanted = dict(
            zip(actual, (out[29:], lse[..., 29:], grads[0][29:], *grads[1:]), strict=True)
        )
        if window == 1:  # One key: the scores cannot matter.
            for name in ("dq", "dk"):
                assert actual.pop(name).abs().max() < 1e-2 and wanted.pop(name).abs().max() < 1e-2
        assert_close(actual, wanted, 2e-6 if dtype is torch.float32 else 1e-2)


def test_a_token_sees_nothing_of_later_ones(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = (drawn((16, 2, 2, 8), dtype, device, seed) for seed in range(3))
    for backend in _backends(device, dtype):
        out, _, _ = backend.forward(q, k, v, 0.3)
        k2, v2 = k.clone(), v.clone()
        k2[10:], v2[10:] = 5.0, -5.0
        other, _, _ = backend.forward(q, k2, v2, 0.3)
        assert torch.equal(out[:10], other[:10]) and not torch.equal(out[10:], other[10:])


@pytest.mark.parametrize("shape", SHAPES)
def test_log_sum_exp_is_what_it_is_said_to_be(
    shape: str, dtype: torch.dtype, device: torch.device
) -> None:
    s, b, h, g, d = SHAPES[shape]
    q, k, v = drawn((s, b, h + 2 * g, d), dtype, device).split([h, g, g], dim=2)
    keys = k.double().repeat_interleave(h // g, dim=2)
    scores = 0.7 * torch.einsum("sbhd,tbhd->bhst", q.double(), keys)
    later = torch.ones(s, s, dtype=torch.bool, device=device).triu(1)
    expected = scores.masked_fill(later, -torch.inf).logsumexp(dim=-1)
    for backend in _backends(device, dtype):
        assert backend.gives_lse
        _, lse, _ = backend.forward(q, k, v, 0.7)
        assert lse.shape == (b, h, s) and lse.dtype == torch.float32
        tolerance = 1e-6 if dtype is torch.float32 else 1e-3
        assert (lse - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1)


@pytest.mark.parametrize("queries", [24, 11], ids=["all", "the-later"])
def test_blocks_merge_to_the_whole_and_so_do_their_gradients(
    queries: int, dtype: torch.dtype, device: torch.device
) -> None:
    for backend in _backends(device, dtype):
        shape = Shape(24, queries, 17, 2, Heads(2, 3, 16))
        check_blocks(backend, shape, dtype, device, 2e-6 if dtype is torch.float32 else 1.5e-2)


@pytest.mark.parametrize("heads", [Heads(2, 3, 4), Heads(3, 1, 4), Heads(1, 5, 2)], ids=str)
def test_heads_are_cut_where_the_projection_has_them(heads: Heads, device: torch.device) -> None:
    qkv = drawn((5, 2, heads.channels), torch.float32, device)
    q, k, v = heads.cut(qkv)
    for group in range(heads.groups):
        start = group * (heads.ratio + 2) * heads.size
        parts = qkv[..., start : start + (heads.ratio + 2) * heads.size].unflatten(
            2, (-1, heads.size)
        )
        assert torch.equal(
            q[:, :, group * heads.ratio : (group + 1) * heads.ratio], parts[:, :, :-2]
        )
        assert torch.equal(k[:, :, group], parts[:, :, -2])
        assert torch.equal(v[:, :, group], parts[:, :, -1])
    assert torch.equal(heads.join(q, k, v), qkv)
    views = (k, v) if heads.ratio > 1 else (q, k, v)
    assert all(part.untyped_storage().data_ptr() == qkv.data_ptr() for part in views)
