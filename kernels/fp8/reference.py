"""Plain torch: the ground truth, and the CPU path, which emulates 8 bits by casts.

Shapes: N rows, C channels; M and N rows of a product, K what is summed over. Products of numbers in
8 bits are exact in fp32, in which they are summed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

SHRINKS = False
"""cuBLAS computes 8 bits by its other interface, whose GEMMs take all processors."""

FORWARD, GRADIENT = torch.float8_e4m3fn, torch.float8_e5m2
"""Types of 8 bits: the one with more precision, and the one with more range."""

LARGEST = {dtype: torch.finfo(dtype).max for dtype in (FORWARD, GRADIENT)}

SIDE = 128
"""Numbers along a side of a block that has a scale of its own."""

SMALLEST = 1e-30
"""Where nothing is larger in absolute value the scale is 1, and all becomes zero."""

Block = tuple[int, int] | None
"""Rows and columns that share a scale: `ROWS`, `SQUARES`, or `WHOLE` for all of a tensor."""

WHOLE: Block = None
ROWS: Block = (1, SIDE)
SQUARES: Block = (SIDE, SIDE)


class Cast(NamedTuple):
    """A matrix in 8 bits.

    Attributes:
        values: [N, C].
        scale: what values are multiplied by, fp32: [1]; or [N, C / 128], column by column in
            memory, where each row has blocks of its own; or [N / 128, C / 128].
    """

    values: Tensor
    scale: Tensor


def cast(x: Tensor, dtype: torch.dtype, block: Block = WHOLE) -> tuple[Cast, Cast]:
    """`x` [..., C] as a matrix [N, C] in 8 bits, and the same turned [C, P].

    Each block is divided by a scale, so that its largest number becomes the largest of `dtype`. P
    is N padded with zeros to a multiple of 16, or of 128 where there are blocks; blocks of the
    turned matrix lie along its own rows.
    """
    rows = x.flatten(0, -2)
    turned = pad(rows.t(), (0, -len(rows) % (16 if block is None else SIDE)))
    return _cast(rows, dtype, block), _cast(turned, dtype, block)


def widened(matrix: Cast) -> Tensor:
    """The numbers that `matrix` stands for, in fp32."""
    scale, (rows, columns) = matrix.scale, matrix.values.shape
    if scale.dim() == 2:
        if len(scale) != rows:
            scale = scale.repeat_interleave(SIDE, 0)[:rows]
        scale = scale.repeat_interleave(SIDE, 1)[:, :columns]
    return matrix.values.float() * scale


def multiply(
    a: Cast, b: Cast, dtype: torch.dtype, bias: Tensor | None = None, *, fast: bool = False
) -> Tensor:
    """`a` [M, K] times `b` [N, K] transposed, plus `bias` [N]. Returns [M, N] in `dtype`.

    With `fast` a GPU may add up less precisely than in fp32.
    """
    product = widened(a) @ widened(b).t()
    return (product if bias is None else product + bias.float()).to(dtype)


def accumulate(grad: Tensor, a: Cast, b: Cast, *, first: bool = False) -> None:
    """Add `a` [M, K] times `b` [N, K] transposed to `grad` [M, N], in place.

    When it is the `first` of a step, what `grad` holds is overwritten without being read.
    """
    product = multiply(a, b, torch.float32)
    if first:
        grad.copy_(product)
    else:
        grad.add_(product)


def _cast(x: Tensor, dtype: torch.dtype, block: Block) -> Cast:
    wide, (height, width) = x.float(), x.shape
    if block is None:
        scale, inverse = _scales(
            wide.abs().amax().view(1) if x.numel() else wide.new_zeros(1), dtype
        )
        return Cast(_rounded(wide * inverse, dtype), scale)
    down, across = (-(-size // side) for size, side in zip(x.shape, block, strict=True))
    padded = pad(wide, (0, across * SIDE - width, 0, down * block[0] - height))
    blocks = padded.view(down, block[0], across, SIDE)
    scale, inverse = _scales(blocks.abs().amax((1, 3)), dtype)
    values = _rounded(blocks * inverse[:, None, :, None], dtype).view(padded.shape)
    if block[0] == 1:
        scale = scale.t().contiguous().t()
    return Cast(values[:height, :width].contiguous(), scale)


def _scales(largest: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What numbers in 8 bits are multiplied by, and what they were multiplied by."""
    most = largest.new_tensor(LARGEST[dtype])
    known = largest > SMALLEST
    one = torch.ones_like(largest)
    return torch.where(known, largest / most, one), torch.where(known, most / largest, one)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)
