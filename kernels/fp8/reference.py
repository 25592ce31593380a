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


def cast(
    x: Tensor, dtype: torch.dtype, block: Block = WHOLE, largest: Tensor | None = None
) -> tuple[Cast, Cast]:
    """`x` [..., C] as a matrix [N, C] in 8 bits, and the same turned [C, P].

    Each block is divided by a scale, so that its largest number becomes the largest of `dtype`. P
    is N padded with zeros to a multiple of 16, or of 128 where there are blocks; blocks of the
    turned matrix lie along its own rows. Where all has one scale it is that of the `largest` [R] of
    all its parts, if they are given.
    """
    rows = x.flatten(0, -2)
    turned = pad(rows.t(), (0, -len(rows) % (16 if block is None else SIDE)))
    return _cast(rows, dtype, block, largest), _cast(turned, dtype, block, largest)


def largest(x: Tensor) -> Tensor:
    """The largest absolute value of `x`, [1] in fp32."""
    return x.abs().amax().float().view(1) if x.numel() else x.new_zeros(1, dtype=torch.float32)


def cast_rows(
    x: Tensor, dtype: torch.dtype, block: Block = WHOLE, largest: Tensor | None = None
) -> Cast:
    """`x` [..., C] as a matrix [N, C] in 8 bits, as `cast` has it, and not turned."""
    return _cast(x.flatten(0, -2), dtype, block, largest)


def turn(matrix: Cast) -> Cast:
    """`matrix` [N, C] turned, [C, P], as `cast` pads it.

    With one scale it has the bits of what `cast` has turned. Blocks of rows lie along the rows of
    the turned matrix afterwards: their numbers are rounded a second time.
    """
    rows = len(matrix.values)
    if matrix.scale.dim() == 1:
        # The bits of zero are those of the integer; torch pads no floats of 8 bits.
        turned = pad(matrix.values.view(torch.uint8).t(), (0, -rows % 16))
        return Cast(turned.contiguous().view(matrix.values.dtype), matrix.scale)
    return _cast(pad(widened(matrix).t(), (0, -rows % SIDE)), matrix.values.dtype, ROWS)


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


def _cast(x: Tensor, dtype: torch.dtype, block: Block, parts: Tensor | None = None) -> Cast:
    wide, (height, width) = x.float(), x.shape
    if block is None:
        most = largest(wide) if parts is None else parts.amax().view(1)
        scale, inverse = _scales(most, dtype)
        return Cast(_rounded(wide * inverse, dtype), scale)
    down, across = (-(-size // side) for size, side in zip(x.shape, block, strict=True))
    padded = pad(wide, (0, across * SIDE - width, 0, down * block[0] - height))
    blocks = padded.view(down, block[0], across, SIDE)
    scale, inverse = _scales(blocks.abs().amax((1, 3)), dtype)
    values = _rounded(blocks * inverse[:, None, :, None], dtype).view(padded.shape)
    if block[0] == 1:
        scale = scale.t().contiguous().t()
    return Cast(values[:height, :width].contiguous(), scale)


def _scales(found: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What numbers in 8 bits are multiplied by, and what they were multiplied by."""
    most = found.new_tensor(LARGEST[dtype])
    known = found > SMALLEST
    one = torch.ones_like(found)
    return torch.where(known, found / most, one), torch.where(known, most / found, one)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.clamp(-LARGEST[dtype], LARGEST[dtype]).to(dtype)
