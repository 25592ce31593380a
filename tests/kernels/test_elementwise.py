"""RMSNorm, activations and rotary embedding against float64 autograd."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from lightning_dhellam.kernels import gelu, gelu_tanh, rms_norm, rope, swiglu
from lightning_dhellam.kernels.attention.heads import Heads
from tests.kernels.checks import TOLERANCE, assert_close, drawn, strided, truth

SHAPES = [(1, 1, 2), (7, 3, 33), (5, 1, 130)]


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(
    shape: tuple[int, ...], residual: bool, dtype: torch.dtype, device: torch.device
) -> None:
    x, dy, branch = (drawn(shape, dtype, device, seed) for seed in range(3))
    weight = 1 + drawn(shape[-1:], dtype, device, 3) / 4

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight

    y, rstd = rms_norm.forward(x, weight, 1e-5)
    dx, dweight = rms_norm.backward(dy, x, weight, rstd, branch if residual else None)
    expected, (expected_dx, expected_dweight) = truth(reference, (x, weight), dy)
    if residual:
        expected_dx = expected_dx + branch.double()
    assert y.dtype == dx.dtype == dtype
    assert rstd.dtype == dweight.dtype == torch.float32
    assert rstd.shape == (*shape[:-1], 1)
    assert_close({"y": y, "dx": dx}, {"y": expected, "dx": expected_dx}, TOLERANCE[dtype])
    # Its sum is in fp32, so the type of the operands costs nothing.
    assert_close({"dweight": dweight}, {"dweight": expected_dweight}, 1e-6)


def test_rms_norm_of_tiny_and_strided_rows(device: torch.device) -> None:
    x = drawn((4, 2, 16), torch.float32, device)
    y, _ = rms_norm.forward(x * 1e-4, torch.ones(16, device=device), 1e-5)
    # Epsilon dominates: without it the rows would have unit mean square.
    assert y.square().mean().item() < 0.01
    weight = torch.ones(16, device=device)
    for plain, other in zip(
        rms_norm.forward(x, weight, 1e-5), rms_norm.forward(strided(x), weight, 1e-5), strict=True
    ):
        torch.testing.assert_close(other, plain, rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("view", [False, True], ids=["contiguous", "strided"])
def test_swiglu(
    shape: tuple[int, ...], view: bool, dtype: torch.dtype, device: torch.device
) -> None:
    gate_up = drawn((*shape[:-1], 2 * shape[-1]), dtype, device) * 3
    dy = drawn(shape, dtype, device, 1)

    def reference(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return gate * torch.sigmoid(gate) * up

    expected, (expected_grad,) = truth(reference, (gate_up,), dy)
    if view:
        gate_up, dy = strided(gate_up), strided(dy)
    y, grad = swiglu.forward(gate_up), swiglu.backward(dy, gate_up)
    assert y.dtype == grad.dtype == dtype
    assert_close(
        {"y": y, "d_gate_up": grad},
        {"y": expected, "d_gate_up": expected_grad},
        TOLERANCE[dtype],
    )


def test_swiglu_of_large_arguments_is_finite(device: torch.device) -> None:
    gate_up = torch.tensor([[-200.0, 200.0, 1.0, 2.0]], device=device)
    assert swiglu.forward(gate_up).tolist() == [[0.0, 400.0]]
    grad = swiglu.backward(torch.ones(1, 2, device=device), gate_up)
    assert grad.tolist() == [[0.0, 2.0, 0.0, 200.0]]


@pytest.mark.parametrize("kernel", [swiglu, gelu, gelu_tanh], ids=["swiglu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("rows", [1, 7])
def test_weighted_activations(
    kernel: ModuleType, rows: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Each row times a weight of its own, before anything is rounded."""
    width = 33
    x = drawn((rows, 2 * width if kernel is swiglu else width), dtype, device) * 3
    dy = drawn((rows, width), dtype, device, 1)
    weights = torch.rand(rows, device=device)

    def reference(x: Tensor, weights: Tensor) -> Tensor:
        if kernel is swiglu:
            gate, up = x.chunk(2, dim=-1)
            return gate * torch.sigmoid(gate) * up * weights[:, None]
        form = "tanh" if kernel is gelu_tanh else "none"
        return torch.nn.functional.gelu(x, approximate=form) * weights[:, None]

    expected, (expected_dx, expected_dweights) = truth(reference, (x, weights), dy)
    y = kernel.weighted_forward(x, weights)
    dx, dweights = kernel.weighted_backward(dy, x, weights)
    assert y.dtype == dx.dtype == dtype
    assert dweights.dtype == torch.float32
    found, wanted = {"y": y, "dx": dx}, {"y": expected, "dx": expected_dx}
    assert_close(found, wanted, TOLERANCE[dtype])
    assert_close({"dweights": dweights}, {"dweights": expected_dweights}, 2e-6)
    # An expert may have no rows.
    assert kernel.weighted_forward(x[:0], weights[:0]).shape == (0, width)
    assert [len(d) for d in kernel.weighted_backward(dy[:0], x[:0], weights[:0])] == [0, 0]


HEADS = [Heads(1, 1, 2), Heads(2, 3, 6), Heads(3, 1, 10)]


def _tables(length: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(length), 10.0 ** -torch.arange(size // 2))
    angles = torch.cat([angles, angles], dim=-1).to(device)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_rope(heads: Heads, dtype: torch.dtype, device: torch.device) -> None:
    groups, ratio, size = heads
    s, b = 7, 3
    cos, sin = _tables(2 * s, size, device)
    # Each sample begins somewhere else, and the last one again in its midst.
    positions = torch.arange(s, device=device)[:, None] + torch.arange(b, device=device) * 3
    positions[4:, -1] = torch.arange(s - 4)
    qkv = drawn((s, b, groups * (ratio + 2) * size), dtype, device)

    def rotated(x: Tensor) -> Tensor:
        # As complex numbers: channel i and channel i + size / 2 are one plane.
        plane = torch.complex(*x.chunk(2, dim=-1))
        half = size // 2
        turn = torch.complex(cos[:, :half].double(), sin[:, :half].double())
        turned = plane * turn[positions][:, :, None]
        return torch.cat([turned.real, turned.imag], dim=-1)

    def reference(qkv: Tensor) -> Tensor:
        grouped = qkv.view(s, b, groups, ratio + 2, size)
        q = rotated(grouped[..., :ratio, :].flatten(2, 3))
        k = rotated(grouped[..., ratio, :])
        return torch.cat([q, k, grouped[..., ratio + 1, :]], dim=2)

    grads = [drawn((s, b, n, size), dtype, device, n) for n in (heads.queries, groups, groups)]
    expected, (expected_grad,) = truth(reference, (qkv,), torch.cat(grads, dim=2))
    out = rope.forward(qkv, positions, cos, sin, heads)
    # Attention hands back permuted views.
    views = [g.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3) for g in grads]
    for handed in (grads, views):
        grad = rope.backward(*handed, positions, cos, sin, heads)
        assert out.dtype == grad.dtype == dtype
        assert_close(
            {"rotated": out.view(expected.shape), "d_qkv": grad},
            {"rotated": expected, "d_qkv": expected_grad},
            TOLERANCE[dtype],
        )
    q, k, v = heads.split(out)
    assert torch.equal(torch.cat([q, k, v], dim=2), out.view(expected.shape))
    assert all(part.untyped_storage().data_ptr() == out.data_ptr() for part in (q, k, v))
