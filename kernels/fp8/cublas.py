"""Casts by Triton, products by cuBLAS through torch; gradients are added in a pass of their own."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_dhellam.kernels.fp8.casts import cast, cast_rows, largest, turn
from lightning_dhellam.kernels.fp8.reference import FORWARD, SHRINKS, SIDE, Cast

__all__ = ["SHRINKS", "accumulate", "cast", "cast_rows", "largest", "multiply", "turn"]

_SCALES = 4
"""Of squares along a row: cuBLAS reads whole fours of them, which is how casts lay them out."""

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
    if len(b.scale) != len(b.values) and not _takes_gaps(b.values.device):
        depth = -a.values.shape[1] % (_SCALES * SIDE)
    return (
        Cast(_padded(a.values, rows, depth), _columns(a.scale, rows, depth // SIDE)),
        Cast(_padded(b.values, 0, depth), _padded(b.scale, 0, depth // SIDE) if depth else b.scale),
    )


@cache
def _takes_gaps(device: torch.device) -> bool:
    """Whether torch takes rows of scales as cuBLAS reads them, with gaps behind some of them.

    Torch that does not wants rows without gaps, of which only whole fours are read right: then
    operands are padded with zeros to so many squares, in every product.
    """
    rows = torch.zeros(_ROWS, SIDE, dtype=FORWARD, device=device)
    squares = torch.zeros(2 * SIDE, SIDE, dtype=FORWARD, device=device)
    of_rows, of_squares = (torch.ones(n, m, device=device) for n, m in ((1, _ROWS), (2, _SCALES)))
    try:
        torch._scaled_mm(
            rows, squares.t(), of_rows.t(), of_squares[:, :1].t(), out_dtype=torch.bfloat16
        )
    except (RuntimeError, ValueError):
        return False
    return True


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
