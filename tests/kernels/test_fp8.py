"""Matrices in 8 bits: what their reference promises, by the spacing of the formats."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_dhellam.kernels import fp8
from tests.kernels.checks import drawn

CPU = torch.device("cpu")
HALF_SPACING = {fp8.FORWARD: 2.0**-4, fp8.GRADIENT: 2.0**-3}
"""Of a number, relative to it."""
SMALLEST = {fp8.FORWARD: 2.0**-9, fp8.GRADIENT: 2.0**-16}
"""The spacing near zero."""
BLOCKS = (fp8.WHOLE, fp8.ROWS, fp8.SQUARES)


def _largest(x: Tensor, block: fp8.Block) -> Tensor:
    """The largest number of each element's block."""
    if block is None:
        return x.abs().max().expand_as(x)
    found = torch.empty_like(x)
    for down in x.split(block[0]):
        for part in down.split(block[1], dim=1):
            rows = slice(part.storage_offset() // x.shape[1], None)
            columns = part.storage_offset() % x.shape[1]
            found[rows][: len(part), columns : columns + part.shape[1]] = part.abs().max()
    return found


@pytest.mark.parametrize("dtype", list(HALF_SPACING), ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_casts_are_off_by_half_a_spacing(dtype: torch.dtype, block: fp8.Block) -> None:
    x = drawn((150, 300), torch.float32, CPU) * torch.exp(drawn((150, 300), torch.float32, CPU, 1))
    as_it_is, turned = fp8.cast(x, dtype, block)
    most = torch.finfo(dtype).max
    for matrix, truth in ((as_it_is, x), (turned, x.t().contiguous())):
        found = fp8.widened(matrix)[:, : truth.shape[1]]
        scale = _largest(truth, block) / most
        allowed = torch.maximum(truth.abs() * HALF_SPACING[dtype], scale * SMALLEST[dtype] / 2)
        assert ((found - truth).abs() <= allowed * 1.0001).all()
        assert matrix.values.float().abs().max() == most  # all of the range is used


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_the_turned_matrix_ends_in_zeros(block: fp8.Block) -> None:
    as_it_is, turned = fp8.cast(drawn((2, 9, 40), torch.bfloat16, CPU), fp8.FORWARD, block)
    assert as_it_is.values.shape == (18, 40)
    assert turned.values.shape == (40, 32 if block is None else 128)
    assert not turned.values[:, 18:].float().any()


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_zeros_tiny_numbers_and_what_is_not_finite(block: fp8.Block) -> None:
    x = torch.zeros(4, 300)
    assert not fp8.widened(fp8.cast(x, fp8.FORWARD, block)[0]).any()
    assert not fp8.widened(fp8.cast(x + 1e-38, fp8.FORWARD, block)[0]).any()
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken = x + 1
        broken[2, 5] = bad
        for matrix in fp8.cast(broken, fp8.GRADIENT, block):
            product = fp8.multiply(matrix, matrix, torch.float32)
            assert not product.isfinite().all(), bad


def test_one_scale_is_that_of_all_parts_and_turns_without_a_rounding() -> None:
    x = drawn((150, 300), torch.bfloat16, CPU)
    whole, turned = fp8.cast(x, fp8.FORWARD)
    parts = x.split(50)
    largest = torch.cat([fp8.largest(part) for part in parts])
    rows = [fp8.cast_rows(part, fp8.FORWARD, largest=largest) for part in parts]
    assert all(torch.equal(part.scale, whole.scale) for part in rows)
    gathered = fp8.Cast(torch.cat([part.values.view(torch.uint8) for part in rows]), whole.scale)
    assert torch.equal(gathered.values, whole.values.view(torch.uint8))
    again = fp8.turn(whole)
    assert torch.equal(again.values.view(torch.uint8), turned.values.view(torch.uint8))
    assert torch.equal(again.scale, turned.scale)


def test_blocks_of_rows_are_rounded_twice_when_they_are_turned() -> None:
    """Each time by half a spacing, the second time of what the first has left."""
    x = drawn((150, 300), torch.float32, CPU) * torch.exp(drawn((150, 300), torch.float32, CPU, 1))
    rows, _ = fp8.cast(x, fp8.FORWARD, fp8.ROWS)
    first = fp8.widened(rows)
    found = fp8.widened(fp8.turn(rows))[:, :150].t()
    half, most = HALF_SPACING[fp8.FORWARD], torch.finfo(fp8.FORWARD).max
    scale = _largest(first.t().contiguous(), fp8.ROWS).t() / most
    allowed = torch.maximum(first.abs() * half, scale * SMALLEST[fp8.FORWARD] / 2)
    assert ((found - first).abs() <= allowed * 1.0001).all()
    once, twice = (((y - x).norm() / x.norm()).item() for y in (first, found))
    assert 1.3 * once < twice < 1.5 * once  # errors independent of each other add up as squares


@pytest.mark.parametrize("block", (fp8.WHOLE, fp8.ROWS), ids=str)
def test_products_of_a_linear_layer(block: fp8.Block) -> None:
    """Errors of independent roundings: a number is off by 0.026 of it or so, a product by more."""
    x, weight, dy = (
        drawn(shape, torch.bfloat16, CPU, seed)
        for seed, shape in enumerate([(3, 70, 256), (384, 256), (3, 70, 384)])
    )
    squares = fp8.SQUARES if block else fp8.WHOLE
    kind = fp8.FORWARD if block else fp8.GRADIENT
    x8, w8, dy8 = (
        fp8.cast(x, fp8.FORWARD, block),
        fp8.cast(weight, fp8.FORWARD, squares),
        fp8.cast(dy, kind, block),
    )
    wide, wide_dy = x.double().flatten(0, 1), dy.double().flatten(0, 1)
    bias, grad = drawn((384,), torch.bfloat16, CPU, 3), torch.full((384, 256), torch.nan)
    fp8.accumulate(grad, dy8[1], x8[1], first=True)
    once = grad.clone()
    fp8.accumulate(grad, dy8[1], x8[1])
    assert torch.equal(grad, 2 * once)
    found = {
        "y": (fp8.multiply(x8[0], w8[0], torch.bfloat16, bias), wide @ weight.double().t() + bias),
        "dx": (fp8.multiply(dy8[0], w8[1], torch.bfloat16), wide_dy @ weight.double()),
        "dweight": (once, wide_dy.t() @ wide),
    }
    for name, (value, truth) in found.items():
        error = ((value.double() - truth).norm() / truth.norm()).item()
        limit = 0.04 if name == "y" or block else 0.065
        assert 0.02 < error < limit, (name, error)
