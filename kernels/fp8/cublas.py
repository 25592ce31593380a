"""Casts by Triton, products by cuBLAS through torch; gradients are added in a pass of their own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_dhellam.kernels.fp8.casts import cast
from lightning_dhellam.kernels.fp8.reference import SHRINKS, SIDE, Cast

__all__ = ["SHRINKS", "accumulate", "cast", "multiply"]

_SCALES = 4
"""Of squares along a row: cuBLAS wants whole fours of them, and not every torch says so."""

_ROWS = 16


def multiply(
    a: Cast, b: Cast, dtype: torch.dtype, bias: Tensor | None = None, *, fast: bool = False
) -> Tensor:
    """Compute what `reference.multiply` does."""
    rows, blocks = len(a.values), a.scale.dim() == 2
    if blocks:
        a, b = _fitting(a, b)
    product: Tensor = torch._scaled_mm(
        a.values,
        b.values.t(),
        a.scale,
        b.scale.t() if b.scale.dim() == 2 else b.scale,
        bias=None if blocks else bias,
        out_dtype=dtype,
        use_fast_accum=fast and not blocks,  # which cuBLAS takes for one scale alone
    )
    if blocks and bias is not None:
        product += bias
    return product[:rows]


def accumulate(grad: Tensor, a: Cast, b: Cast, *, first: bool = False) -> None:
    """Compute what `reference.accumulate` does, the product in fp32."""
    product = multiply(a, b, torch.float32)
    if first:
        grad.copy_(product)
    else:
        grad.add_(product)


def _fitting(a: Cast, b: Cast) -> tuple[Cast, Cast]:
    """The same two in blocks, of sizes that cuBLAS takes: zeros are added."""
    rows, depth = -len(a.values) % _ROWS, 0
    if len(b.scale) != len(b.values):
        depth = -a.values.shape[1] % (_SCALES * SIDE)
    return (
        Cast(_padded(a.values, rows, depth), _columns(a.scale, rows, depth // SIDE)),
        Cast(_padded(b.values, 0, depth), _padded(b.scale, 0, depth // SIDE) if depth else b.scale),
    )


def _columns(scale: Tensor, rows: int, columns: int) -> Tensor:
    """Scales with more rows and columns, column by column in memory."""
    return _padded(scale.t(), columns, rows).t() if rows or columns else scale


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    if not rows and not columns:
        return x
    if x.itemsize > 1:
        return pad(x, (0, columns, 0, rows))
    # The bits of zero are those of the integer; torch pads no floats of 8 bits.
    return pad(x.view(torch.uint8), (0, columns, 0, rows)).view(x.dtype)
