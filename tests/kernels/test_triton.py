"""Triton kernels against their references: on the GPU, and in Triton's interpreter on the CPU.

On the CPU `test_interpreter.py` runs this file in a process of its own: Triton decides on import
whether it interprets, and other tests import it earlier.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device or TRITON_INTERPRET=1", allow_module_level=True)

from lightning_dhellam.kernels import cross_entropy, dropout, fp8, masters, parity
from lightning_dhellam.kernels.attention.heads import Heads
from lightning_dhellam.kernels.candidates import CANDIDATES
from lightning_dhellam.kernels.dropout.philox import philox

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
OPERATORS = tuple(parity.CASES)
BLOCKS = (fp8.WHOLE, fp8.ROWS, fp8.SQUARES)
# Triton's interpreter cuts fp32 off to bf16 where the GPU rounds to the nearest.
SLACK = 1.0 if torch.cuda.is_available() else 2.0


def triton_of(operator: str) -> Any:
    return importlib.import_module(f"lightning_dhellam.kernels.{operator}.triton")


@pytest.mark.parametrize("dtype", list(parity.LIMITS), ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("tokens", "width"), [(5, 96), (6, 37), (3, 20)])
@pytest.mark.parametrize("operator", OPERATORS)
def test_triton_agrees_with_the_reference(
    operator: str, tokens: int, width: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    draw = parity.Draw(tokens, width, dtype, DEVICE)
    assert not parity.check(operator, triton_of(operator), draw, SLACK)


@pytest.mark.parametrize("operator", OPERATORS)
def test_rows_wider_than_a_block(operator: str) -> None:
    torch.manual_seed(0)
    draw = parity.Draw(3, 4999, torch.bfloat16, DEVICE)
    assert not parity.check(operator, triton_of(operator), draw, SLACK)


@pytest.mark.parametrize("operator", OPERATORS)
def test_parity_notices_a_wrong_kernel(operator: str) -> None:
    class Broken:
        def __getattr__(self, name: str) -> Any:
            function = getattr(triton_of(operator), name)

            def wrong(*args: Any, **options: Any) -> Any:
                result = function(*args, **options)
                # What computes in place returns nothing.
                lists = (a for a in args if isinstance(a, list))
                first = next(lists, args[0]) if result is None else result
                while isinstance(first, tuple | list):
                    first = first[0]
                first.view(-1)[-1] = float("nan")
                return result

            return wrong

    assert parity.check(operator, Broken(), parity.Draw(4, 40, torch.float32, DEVICE))


def test_dropout_draws_the_same_bits_as_the_reference() -> None:
    x = torch.ones(3, 2111, device=DEVICE)
    for key in (3, 0xFEDC_BA98_7654_321):
        for p in (0.0, 0.25, 1.0):
            ours = triton_of("dropout").forward(x, p, key)
            assert torch.equal(ours, dropout.forward(x, p, key)), (key, p)


def test_philox_is_the_published_generator() -> None:
    # Known answer of Random123 for a counter and a key of zeros.
    words = [word.item() for word in philox(torch.zeros(1, dtype=torch.int64), 0)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def test_a_rank_of_padding_only() -> None:
    """Its statistics change nothing for the other ranks, and its gradient is zero."""
    backend = triton_of("cross_entropy")
    logits = torch.full((4, 16), float("nan"), device=DEVICE)
    labels = torch.arange(4, device=DEVICE)
    nothing = backend.statistics(logits, labels, 16, 0)
    assert torch.equal(nothing, cross_entropy.statistics(logits, labels, 16, 0))
    grad = backend.backward_(logits, labels, labels.float(), labels.float(), 16, 0)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_logits_of_minus_infinity() -> None:
    """A row of which this rank's part is impossible, and one with a single possible column."""
    backend = triton_of("cross_entropy")
    logits = torch.full((2, 9), -torch.inf, device=DEVICE)
    logits[1, 3] = 2.0
    labels = torch.tensor([0, 3], device=DEVICE)
    found = backend.statistics(logits, labels, 9, 9)
    assert found[:, 0].tolist() == [-torch.inf, 0.0, 0.0]
    assert found[:2, 1].tolist() == [2.0, 1.0]


def _norm_results(operator: str, x: Tensor, dy: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    backend = triton_of(operator)
    parameters = [torch.ones(x.shape[-1], device=DEVICE) * n for n in (2, 3)]
    parameters = parameters[: 2 if operator == "layer_norm" else 1]
    forward = backend.forward(x, *parameters, 1e-5)
    fused = backend.residual_forward(x, residual, *parameters, 1e-5)
    return (*forward, *fused, *backend.backward(dy, x, parameters[0], forward[1], residual))


def _rope_results(x: Tensor, dy: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    rope = triton_of("rope")
    heads = Heads(2, 3, 4)
    cos, sin = torch.rand(2, 6, 2, device=DEVICE).repeat(1, 1, 2)
    parts = heads.split(dy.contiguous())
    if not x.is_contiguous():  # each with gaps of its own between samples
        parts = tuple(torch.cat([part, part], dim=1)[:, :2] for part in parts)
    tables = torch.arange(12, device=DEVICE).view(2, 6).t() // 2, cos, sin, heads
    return rope.forward(x, *tables), rope.backward(*parts, *tables)


def _dropout_results(x: Tensor, dy: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    dropout = triton_of("dropout")
    return (
        dropout.forward(x, 0.4, 3),
        dropout.forward_add(x, residual, 0.4, 3),
        dropout.backward(dy, 0.4, 3),
    )


def _merge_results(x: Tensor, dy: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    lse = torch.rand(2, 5, 6, device=DEVICE)
    return triton_of("merge").forward(x, lse, dy[2:], lse[..., 2:] / 3, torch.float32)


def _grouped_results(x: Tensor, dy: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    grouped = triton_of("grouped")
    x, dy = x.flatten(1), dy[..., :8].flatten(1)
    ends = torch.tensor([2, 2, 6], dtype=torch.int32, device=DEVICE)
    weights = list(torch.randn(3, 16, 80, device=DEVICE).unbind())
    grads = [torch.ones_like(weight) for weight in weights]
    grouped.weight_grad(dy, x, grads, [False, True, False], ends)
    return grouped.forward(x, weights, ends), grouped.data_grad(dy, weights, ends), *grads


def _fp8_results(x: Tensor, dy: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    kernel, x, dy = triton_of("fp8"), x.flatten(1), dy[..., :16].flatten(1)
    if x.is_cuda:  # which casts numbers of 16 bits
        x, dy = x.bfloat16(), dy.bfloat16()
    casts = [c for block in BLOCKS for t in (x, dy) for c in kernel.cast(t, fp8.FORWARD, block)]
    grad = torch.ones(32, 80, device=DEVICE)
    kernel.accumulate(grad, casts[3], casts[1])
    parts = [part for one in casts for part in (one.values.view(torch.uint8), one.scale)]
    return *parts, kernel.multiply(casts[3], casts[1], torch.float32), grad


def _permute_results(x: Tensor, dy: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    permute = triton_of("permute")
    x, dy, rows = (t.flatten(1)[:2] for t in (x, dy, residual))
    order, place, _ = permute.sort(torch.tensor([[0, 2], [1, 0]], device=DEVICE), 3)
    rows = torch.cat([rows, rows[:1], x[:1]])
    weights = torch.rand(2, 2, device=DEVICE)
    wide = torch.stack([weights, weights], dim=2)[..., 0]
    return (
        permute.permute(x, order),
        permute.permute(x, order, torch.stack([place, place], dim=2)[..., 0]),
        permute.unpermute(rows, place, wide, torch.float32),
        *permute.unpermute_backward(dy, rows, order, place, wide),
    )


def _gelu_results(operator: str, x: Tensor, dy: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    return triton_of(operator).forward(x), triton_of(operator).backward(dy, x)


def _statistics(x: Tensor, dy: Tensor, residual: Tensor) -> tuple[Tensor, ...]:
    labels = torch.arange(24, device=DEVICE)[::2]
    return (triton_of("cross_entropy").statistics(x.flatten(0, 1), labels, 0, 37),)


RESULTS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]] = {
    "cross_entropy": _statistics,
    "dropout": _dropout_results,
    "fp8": _fp8_results,
    "gelu": partial(_gelu_results, "gelu"),
    "gelu_tanh": partial(_gelu_results, "gelu_tanh"),
    "grouped": _grouped_results,
    "layer_norm": partial(_norm_results, "layer_norm"),
    "merge": _merge_results,
    "permute": _permute_results,
    "rms_norm": partial(_norm_results, "rms_norm"),
    "rope": _rope_results,
    "swiglu": lambda x, dy, _: (
        triton_of("swiglu").forward(x),
        triton_of("swiglu").backward(dy[..., :20], x),
    ),
}


@pytest.mark.parametrize("operator", OPERATORS)
def test_results_do_not_depend_on_strides(operator: str) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(3, 6, 2, 80, generator=generator).to(DEVICE)
    strided = [t[..., ::2] for t in wide]
    assert not any(t.is_contiguous() for t in strided)
    torch.manual_seed(1)
    expected = RESULTS[operator](*(t.contiguous() for t in strided))
    torch.manual_seed(1)
    found = RESULTS[operator](*strided)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("operator", OPERATORS)
def test_training_sizes_on_the_gpu(operator: str) -> None:
    draw = parity.Draw(4097, 4096, torch.bfloat16, DEVICE)
    assert not parity.check(operator, triton_of(operator), draw)


@pytest.mark.parametrize("dtype", [fp8.FORWARD, fp8.GRADIENT], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_casts_to_8_bits_are_those_of_the_reference(dtype: torch.dtype, block: fp8.Block) -> None:
    """Of numbers far apart, the largest and the smallest of a type, and of nothing but zeros."""
    torch.manual_seed(0)
    spread = torch.randn(150, 300) * torch.exp(4 * torch.randn(150, 300))
    spread[0, :5] = torch.tensor([0.0, -0.0, 3e38, 1e-38, -3e38])
    drawn = [torch.randn(7, 130), spread, torch.zeros(3, 16)]
    if DEVICE.type == "cuda":
        drawn.append(torch.randn(8192, 4096))
    for x in drawn:
        x = x.bfloat16().to(DEVICE)
        found, expected = triton_of("fp8").cast(x, dtype, block), fp8.cast(x, dtype, block)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a.scale, b.scale)
            assert torch.equal(a.values.float(), b.values.float())
            assert block != fp8.SQUARES or a.scale.stride(0) % 4 == 0  # as cuBLAS reads them


@pytest.mark.gpu
def test_gradients_in_one_pass_are_those_of_two() -> None:
    """Also where they begin at an odd place, as in a buffer that many share."""
    pytest.importorskip("nvmath")
    torch.manual_seed(0)
    x, dy = torch.randn(1040, 384, device=DEVICE), torch.randn(1040, 640, device=DEVICE)
    for place in (0, 1, 4):
        for block, gradient in ((fp8.WHOLE, fp8.GRADIENT), (fp8.ROWS, fp8.FORWARD)):
            grads = []
            for backend in ("cublas", "cublaslt"):
                kernel = CANDIDATES["fp8"][backend].load()
                a = kernel.cast(dy.bfloat16(), gradient, block)[1]
                b = kernel.cast(x.bfloat16(), fp8.FORWARD, block)[1]
                grad = torch.zeros(place + 640 * 384, device=DEVICE)[place:].view(640, 384)
                grad.fill_(torch.nan)
                kernel.accumulate(grad, a, b, first=True)
                kernel.accumulate(grad, a, b)
                grads.append(grad)
            # What is added in one pass is rounded once more in two.
            assert (grads[0] - grads[1]).norm() <= 1e-6 * grads[0].norm()


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cublaslt", "cublas", "triton"])
def test_products_of_8_bits_and_no_wait_on_the_gpu(backend: str) -> None:
    """Odd numbers of rows and, by squares, of blocks: what is added to fit changes nothing."""
    pytest.importorskip(CANDIDATES["fp8"][backend].package or "torch")
    kernel = CANDIDATES["fp8"][backend].load()
    torch.manual_seed(0)
    for width in (384, 4096):
        assert not parity.check("fp8", kernel, parity.Draw(1027, width, torch.bfloat16, DEVICE))
    x, dy = (torch.randn(513, 256, device=DEVICE).bfloat16() for _ in range(2))
    weight = torch.randn(512, 256, device=DEVICE).bfloat16()
    x[7, 9] = torch.nan
    grad = torch.zeros(256, 256, device=DEVICE)

    def step(block: fp8.Block) -> None:
        a, b = kernel.cast(dy, fp8.FORWARD, block), kernel.cast(x, fp8.FORWARD, block)
        kernel.multiply(a[0], kernel.cast(weight, fp8.FORWARD, block)[0], torch.bfloat16, fast=True)
        kernel.accumulate(grad, a[1], b[1], first=True)
        kernel.accumulate(grad, a[1], b[1])

    for block in (fp8.WHOLE, fp8.ROWS):
        step(block)  # compiles
        assert grad[:, 9].isnan().all() and not grad[:, 10].isnan().any()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(block)
        finally:
            torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 4096, 10001])
def test_masters_follow_their_weights(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31 - 1, (size,), dtype=torch.int32, generator=generator)
    # NaN are rounded to one of them.
    master = bits.view(torch.float32).nan_to_num().to(DEVICE)
    weight = master.to(dtype)
    weight[::7] = torch.randn(len(weight[::7]), generator=generator).to(weight)
    expected, found = master.clone(), master.clone()
    masters.reference.take_changes_(expected, weight)
    triton_of("masters").take_changes_(found, weight)
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))
    assert size == 1 or not torch.equal(found, master)
