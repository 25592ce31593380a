"""The GEMMs, the embedding, and their accumulation into a gradient that is already there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_dhellam.kernels import choose, embedding
from lightning_dhellam.kernels.candidates import CANDIDATES
from lightning_dhellam.kernels.protocols import LinearKernel
from tests.kernels.checks import TOLERANCE, assert_close, drawn, strided, truth


def _backends(device: torch.device) -> list[LinearKernel]:
    """Every implementation that computes on `device`."""
    usable = choose.available("linear", device, torch.bfloat16)
    return [CANDIDATES["linear"][name].load() for name, why in usable if why is None]


@pytest.mark.parametrize("sizes", [(1, 1, 8, 8), (7, 3, 40, 24), (5, 2, 8, 56)], ids=str)
@pytest.mark.parametrize("view", [False, True], ids=["contiguous", "strided"])
def test_linear(
    sizes: tuple[int, int, int, int], view: bool, dtype: torch.dtype, device: torch.device
) -> None:
    s, b, inputs, outputs = sizes
    x, weight = drawn((s, b, inputs), dtype, device), drawn((outputs, inputs), dtype, device, 1)
    dy = drawn((s, b, outputs), dtype, device, 2)
    already = drawn((outputs, inputs), torch.float32, device, 3)
    expected, (dx, dweight) = truth(torch.nn.functional.linear, (x, weight), dy)
    if view:
        x, dy = strided(x), strided(dy)
    for linear in _backends(device):
        grad = already.clone()
        linear.accumulate_wgrad(grad, dy, x)
        assert_close(
            {"y": linear.forward(x, weight), "dx": linear.dgrad(dy, weight)},
            {"y": expected, "dx": dx},
            TOLERANCE[dtype],
        )
        # Products of 16-bit numbers are exact in fp32, where they are summed.
        assert_close({"grad": grad}, {"grad": already.double() + dweight}, 1e-6)
        grad.fill_(torch.nan)
        linear.accumulate_wgrad(grad, dy, x, first=True)
        assert_close({"grad": grad}, {"grad": dweight}, 1e-6)


def test_a_bias_and_its_gradient(dtype: torch.dtype, device: torch.device) -> None:
    x, weight = drawn((7, 3, 24), dtype, device), drawn((40, 24), dtype, device, 1)
    bias, dy = drawn((40,), dtype, device, 2), drawn((7, 3, 40), dtype, device, 3)
    already = drawn((40,), torch.float32, device, 4)
    expected, (_, _, dbias) = truth(torch.nn.functional.linear, (x, weight, bias), dy)
    for linear in _backends(device):
        assert_close({"y": linear.forward(x, weight, bias)}, {"y": expected}, TOLERANCE[dtype])
        grad = already.clone()
        linear.accumulate_bias_grad(grad, strided(dy))
        assert_close({"grad": grad}, {"grad": already.double() + dbias}, 1e-6)
        grad.fill_(torch.nan)
        linear.accumulate_bias_grad(grad, dy, first=True)
        assert_close({"grad": grad}, {"grad": dbias}, 1e-6)


def test_sixteen_bit_gradients_accumulate_too(dtype: torch.dtype, device: torch.device) -> None:
    x, dy = (drawn((9, 2, 8), dtype, device, seed) for seed in (0, 1))
    for linear in _backends(device):
        grad = drawn((8, 8), torch.bfloat16, device, 2)
        expected = grad.double() + dy.double().flatten(0, 1).t() @ x.double().flatten(0, 1)
        linear.accumulate_wgrad(grad, dy, x)
        assert grad.dtype == torch.bfloat16
        assert_close({"grad": grad}, {"grad": expected}, 5e-3)


def test_many_small_additions_are_not_lost(device: torch.device) -> None:
    # In bf16 the sum would stop growing at 256.
    ones = torch.ones(1, 1, 8, dtype=torch.bfloat16, device=device)
    for linear in _backends(device):
        grad = torch.zeros(8, 8, device=device)
        for _ in range(300):
            linear.accumulate_wgrad(grad, ones, ones)
        assert torch.all(grad == 300)


@pytest.mark.parametrize("ranks", [1, 3])
def test_embedding_over_ranks(ranks: int, dtype: torch.dtype, device: torch.device) -> None:
    vocabulary, hidden, rows = 21, 5, 21 // ranks
    weight = drawn((vocabulary, hidden), dtype, device)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (3, 17), generator=generator).to(device)
    dy = drawn((17, 3, hidden), dtype, device, 1)
    already = drawn((vocabulary, hidden), torch.float32, device, 2)
    grad = already.clone()

    def reference(weight: Tensor) -> Tensor:
        return torch.nn.functional.embedding(tokens.t(), weight)

    expected, (dweight,) = truth(reference, (weight,), dy)
    total = torch.zeros(17, 3, hidden, dtype=dtype, device=device)
    for rank in range(ranks):
        mine = slice(rank * rows, (rank + 1) * rows)
        total += embedding.forward(tokens, weight[mine], rank * rows)
        embedding.accumulate_wgrad(grad[mine], dy, tokens, rank * rows)
    assert torch.equal(total.double(), expected)
    assert_close({"grad": grad}, {"grad": already.double() + dweight}, 1e-6)


def test_embedding_gradient_is_reproducible(device: torch.device) -> None:
    tokens = torch.zeros(4, 64, dtype=torch.long, device=device)
    dy = drawn((64, 4, 9), torch.float32, device)
    grads = [torch.zeros(3, 9, device=device) for _ in range(5)]
    for grad in grads:
        embedding.accumulate_wgrad(grad, dy, tokens, 0)
    assert all(torch.equal(grad, grads[0]) for grad in grads)
