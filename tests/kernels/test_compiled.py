"""Triton's compiler takes every kernel for a Hopper GPU, with loads of 16 bytes. Needs no GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_dhellam.kernels import fp8, parity

pytest.importorskip("triton")
GPUTarget = importlib.import_module("triton.backends.compiler").GPUTarget
JITFunction = importlib.import_module("triton.runtime.jit").JITFunction
driver = importlib.import_module("triton.runtime.driver").driver

ROWS, WIDTH = 8, 4096


class Hopper:
    """What the compiler asks of a driver."""

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Iterator[list[tuple[str, str]]]:
    """Names and PTX of the kernels that were called: they are compiled, and not launched."""
    found: list[tuple[str, str]] = []

    def compile_(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        made = kernel.run(*args, grid=grid, warmup=True, **options)
        assert made.asm["cubin"]
        found.append((kernel.__name__, made.asm["ptx"]))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        JITFunction, "__getitem__", lambda self, grid: partial(compile_, self, grid)
    )
    monkeypatch.setattr(driver, "_active", Hopper())
    yield found


def _zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


def _norm(backend: Any, parameters: int) -> None:
    x, weight = _zeros(ROWS, WIDTH), _zeros(WIDTH)
    backend.forward(x, *[weight] * parameters, 1e-5)
    backend.residual_forward(x, x, *[weight] * parameters, 1e-5)
    for residual in (None, x):
        backend.backward(x, x, weight, _zeros(ROWS, parameters, dtype=torch.float32), residual)


def _rope(backend: Any) -> None:
    heads = backend.Heads(8, 4, 128)
    fused, table = _zeros(ROWS, 1, 48 * 128), _zeros(ROWS, 128, dtype=torch.float32)
    tables = _zeros(ROWS, 1, dtype=torch.int64), table, table, heads
    backend.forward(fused, *tables)
    parts = (part.contiguous() for part in heads.cut(fused[..., : heads.channels]))
    backend.backward(*parts, *tables)


def _cross_entropy(backend: Any) -> None:
    # A vocabulary that is padded to a multiple of 8, as GPT-2's is.
    logits, labels = _zeros(ROWS, 50264), _zeros(ROWS, dtype=torch.int64)
    number = _zeros(ROWS, dtype=torch.float32)
    backend.statistics(logits, labels, 0, 50257)
    backend.combine(_zeros(8, 3, ROWS, dtype=torch.float32))
    backend.backward_(logits, labels, number, number, 0, 50257)


def _dropout(backend: Any) -> None:
    x = _zeros(ROWS, WIDTH)
    backend.forward(x, 0.1, 1 << 40, _zeros(ROWS, dtype=torch.int64))
    backend.forward_add(x, x, 0.1, 1 << 40)
    backend.forward(x, 0.1, 1 << 40, None, (WIDTH, 8 * WIDTH))


def _merge(backend: Any) -> None:
    out, lse = _zeros(64, 1, WIDTH), _zeros(1, 32, 64, dtype=torch.float32)
    backend.forward(out, lse, out, lse, torch.float32)
    backend.forward(out.float(), lse, out[32:], lse[..., 32:], torch.bfloat16)


def _activation(backend: Any, halves: int) -> None:
    x, weights = _zeros(ROWS, halves * WIDTH), _zeros(ROWS, dtype=torch.float32)
    backend.forward(x)
    backend.backward(_zeros(ROWS, WIDTH), x)
    backend.weighted_forward(x, weights)
    backend.weighted_backward(_zeros(ROWS, WIDTH), x, weights)


def _grouped(backend: Any) -> None:
    x, dy, ends = _zeros(ROWS, WIDTH), _zeros(ROWS, 512), _zeros(3, dtype=torch.int32)
    weights = [_zeros(512, WIDTH) for _ in range(3)]
    backend.forward(x, weights, ends)
    backend.data_grad(dy, weights, ends)
    backend.weight_grad(dy, x, [weight.float() for weight in weights], [False] * 3, ends)
    backend.weight_grad(dy, x, weights, [False] * 3, ends)
    biases, scale = [_zeros(512) for _ in range(3)], _zeros(ROWS, dtype=torch.float32)
    backend.add_bias_(dy, biases, ends, None, scale)
    backend.bias_grad(dy, biases, [False] * 3, ends, None, scale)


def _fp8(backend: Any) -> None:
    kinds = [(fp8.WHOLE, fp8.FORWARD), (fp8.WHOLE, fp8.GRADIENT), (fp8.ROWS, fp8.FORWARD)]
    kinds.append((fp8.SQUARES, fp8.FORWARD))
    x, dy, *_ = (backend.cast(_zeros(256, WIDTH), dtype, block)[1] for block, dtype in kinds)
    for first in (True, False):
        backend.accumulate(_zeros(WIDTH, WIDTH, dtype=torch.float32), dy, x, first=first)


def _permute(backend: Any) -> None:
    x, order = _zeros(ROWS, WIDTH), _zeros(2 * ROWS, dtype=torch.int32)
    weights = _zeros(ROWS, 2, dtype=torch.float32)
    rows, place = backend.permute(x, order), order.view(ROWS, 2)
    backend.permute(x, order, place)
    backend.unpermute(rows, place, None, torch.bfloat16)
    backend.unpermute(rows, place, weights, torch.float32)
    backend.unpermute_backward(x, rows, order, place, weights)


CALLS: dict[str, Callable[[Any], None]] = {
    "cross_entropy": _cross_entropy,
    "dropout": _dropout,
    "fp8": _fp8,
    "gelu": partial(_activation, halves=1),
    "gelu_tanh": partial(_activation, halves=1),
    "grouped": _grouped,
    "layer_norm": partial(_norm, parameters=2),
    "merge": _merge,
    "permute": _permute,
    "rms_norm": partial(_norm, parameters=1),
    "rope": _rope,
    "swiglu": partial(_activation, halves=2),
}


def test_numbers_of_elements_may_need_more_than_32_bits() -> None:
    """To Triton a parameter that is annotated as `int` has 32, whatever it is given."""
    found = set()
    for place in (*(f"{operator}.triton" for operator in (*CALLS, "masters")), "fp8.casts"):
        module = importlib.import_module(f"lightning_dhellam.kernels.{place}")
        for name, kernel in vars(module).items():
            for parameter in kernel.params if isinstance(kernel, JITFunction) else ():
                if parameter.name in ("size", "limit", "key"):
                    found.add(place.partition(".")[0])
                    assert not parameter.annotation_type, f"{place}: {name}"
    assert found == {"dropout", "fp8", "gelu", "gelu_tanh", "masters"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU's own driver compiles them")
@pytest.mark.parametrize("operator", list(parity.CASES))
def test_every_kernel_compiles_for_hopper(operator: str, compiled: list[tuple[str, str]]) -> None:
    CALLS[operator](importlib.import_module(f"lightning_dhellam.kernels.{operator}.triton"))
    assert len(compiled) >= 2
    # Four words of a counter go to four runs of a row: 8 bytes for each thread.
    wide = "v2.b32" if operator == "dropout" else "v4.b32"
    for name, code in compiled:
        if name in ("_combine", "_clear"):
            continue  # moves a few numbers per token, or nothing
        if name in ("_multiply", "_add_product", "_add_products"):
            # Operands go from memory to the tensor cores past the registers.
            assert "cp.async.bulk.tensor" in code and "wgmma" in code, name
            continue
        assert f"ld.global.{wide}" in code, f"{operator}: {name} loads in small pieces"
