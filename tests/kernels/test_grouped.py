"""GEMMs of the groups of experts, against float64 autograd: every backend that computes here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lightning_dhellam.kernels import choose
from lightning_dhellam.kernels.candidates import CANDIDATES
from lightning_dhellam.kernels.protocols import GroupedKernel
from tests.kernels.checks import TOLERANCE, assert_close, drawn

SIZES = {
    "even": (8, 8, 8, 8),
    "uneven": (1, 0, 130, 5),
    "one group has all": (0, 0, 70, 0),
    "one row": (0, 1, 0, 0),
    "no rows": (0, 0, 0, 0),
}
BEHIND = 3
"""Rows of no group, which hold NaN."""


class Case(NamedTuple):
    """Rows of four groups, and what is true of them in float64."""

    x: Tensor
    dy: Tensor
    weights: list[Tensor]
    ends: Tensor
    rows: Sequence[int]

    @property
    def count(self) -> int:
        return sum(self.rows)

    @property
    def parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The rows, those of the gradient, and the weight of each group."""
        parts = (t[: self.count].double().split(list(self.rows)) for t in (self.x, self.dy))
        return zip(*parts, (weight.double() for weight in self.weights), strict=True)


def _case(rows: Sequence[int], dtype: torch.dtype, device: torch.device) -> Case:
    inputs, outputs = 40, 72
    x = drawn((sum(rows) + BEHIND, inputs), dtype, device)
    dy = drawn((sum(rows) + BEHIND, outputs), dtype, device, 1)
    x[sum(rows) :] = dy[sum(rows) :] = torch.nan
    weights = list(drawn((len(rows), outputs, inputs), dtype, device, 2).unbind())
    ends = torch.tensor(rows).cumsum(0).to(device, torch.int32)
    return Case(x, dy, weights, ends, rows)


def _backends(device: torch.device, dtype: torch.dtype) -> list[GroupedKernel]:
    usable = choose.available("grouped", device, dtype)
    return [CANDIDATES["grouped"][name].load() for name, why in usable if why is None]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("known", [True, False], ids=["host", "device"])
def test_products_of_every_group(
    sizes: str, known: bool, dtype: torch.dtype, device: torch.device
) -> None:
    case = _case(SIZES[sizes], dtype, device)
    rows = case.rows if known else None
    y, dx = (
        torch.cat([product(part) for part in case.parts])
        for product in (lambda p: p[0] @ p[2].t(), lambda p: p[1] @ p[2])
    )
    for backend in _backends(device, dtype):
        found = {
            "y": backend.forward(case.x, case.weights, case.ends, rows),
            "dx": backend.data_grad(case.dy, case.weights, case.ends, rows),
        }
        assert all(len(t) == case.count + BEHIND and t.dtype == dtype for t in found.values())
        if case.count:
            kept = {name: t[: case.count] for name, t in found.items()}
            assert_close(kept, {"y": y, "dx": dx}, TOLERANCE[dtype])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=["into fp32", "into bf16"])
def test_weight_gradients_are_added_in_place(
    sizes: str, kind: torch.dtype, dtype: torch.dtype, device: torch.device
) -> None:
    """Fresh ones overwrite what was there, with zeros where no row has come."""
    case = _case(SIZES[sizes], dtype, device)
    products = [dy.t() @ x for x, dy, _ in case.parts]
    for backend in _backends(device, dtype):
        for fresh in ([False] * 4, [True] * 4, [True, False, False, True]):
            buffer = drawn((4, 72, 40), kind, device, 3)
            expected = [
                product if first else product + grad.double()
                for product, grad, first in zip(products, buffer, fresh, strict=True)
            ]
            buffer[torch.tensor(fresh)] = torch.nan
            backend.weight_grad(case.dy, case.x, list(buffer.unbind()), fresh, case.ends, None)
            limit = 1e-6 if kind is torch.float32 else TOLERANCE[kind]
            for group, (grad, truth) in enumerate(zip(buffer, expected, strict=True)):
                if truth.any():
                    assert_close({str(group): grad}, {str(group): truth}, limit)
                else:
                    assert not grad.any(), group


def test_gradients_far_apart_are_found(dtype: torch.dtype, device: torch.device) -> None:
    """Parts of one buffer in another order, with others between them, as Megatron lays them."""
    case = _case(SIZES["uneven"], dtype, device)
    for backend in _backends(device, dtype):
        buffer = torch.zeros(9, 72, 40, device=device)
        grads = [buffer[place] for place in (7, 2, 5, 0)]
        backend.weight_grad(case.dy, case.x, grads, [False] * 4, case.ends, case.rows)
        expected = [dy.t() @ x for x, dy, _ in case.parts]
        assert not buffer[[1, 3, 4, 6, 8]].any() and not grads[1].any()
        found = dict(zip("acd", (grads[0], grads[2], grads[3]), strict=True))
        truth = dict(zip("acd", (expected[0], expected[2], expected[3]), strict=True))
        assert_close(found, truth, 1e-6)


@pytest.mark.parametrize("scaled", [False, True], ids=["alone", "scaled"])
def test_biases_and_their_gradients(scaled: bool, dtype: torch.dtype, device: torch.device) -> None:
    case = _case(SIZES["uneven"], dtype, device)
    biases = list(drawn((4, 72), dtype, device, 4).unbind())
    scale = drawn((len(case.x),), torch.float32, device, 5) if scaled else None
    factor = torch.ones(len(case.x), device=device) if scale is None else scale
    factors = factor[: case.count, None].double().split(list(case.rows))
    parts = list(zip(case.parts, factors, biases, strict=True))
    y = torch.cat([dy + times * bias.double() for (_, dy, _), times, bias in parts])
    expected = [(dy * times).sum(0) for (_, dy, _), times, _ in parts]
    for backend in _backends(device, dtype):
        out = backend.add_bias_(case.dy.clone(), biases, case.ends, None, scale)
        assert_close({"y": out[: case.count]}, {"y": y}, TOLERANCE[dtype])
        grads = list(torch.full((4, 72), torch.nan, device=device).unbind())
        backend.bias_grad(case.dy, grads, [True] * 4, case.ends, case.rows, scale)
        backend.bias_grad(case.dy, grads, [False] * 4, case.ends, None, scale)
        assert not grads[1].any()
        found = {str(g): grads[g] for g in (0, 2, 3)}
        assert_close(found, {str(g): 2 * expected[g] for g in (0, 2, 3)}, 1e-6)


def test_weights_that_are_trained_are_read(device: torch.device) -> None:
    """As parameters, outside of `no_grad`."""
    case = _case(SIZES["even"], torch.float32, device)
    weights = [torch.nn.Parameter(weight) for weight in case.weights]
    for backend in _backends(device, torch.float32):
        y = backend.forward(case.x, weights, case.ends, case.rows)
        dx = backend.data_grad(case.dy, weights, case.ends)
        assert not y.requires_grad and not dx.requires_grad


@pytest.mark.gpu
def test_the_host_waits_for_nothing() -> None:
    device = torch.device("cuda")
    case = _case(SIZES["uneven"], torch.bfloat16, device)
    grads = list(torch.zeros(4, 72, 40, device=device).unbind())
    backend = choose.choose(device, torch.bfloat16).grouped

    def step() -> None:
        backend.forward(case.x, case.weights, case.ends)
        backend.data_grad(case.dy, case.weights, case.ends)
        backend.weight_grad(case.dy, case.x, grads, [False] * 4, case.ends)

    step()  # compiles, and makes tables of where the tensors lie
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(before)
