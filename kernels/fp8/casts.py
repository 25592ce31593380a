"""Triton: a matrix in 8 bits, as it is and turned, in one pass; with a scale of all of it in two.

The first pass leaves the largest number of each program, and every program of the second takes the
largest of those: there is nothing to clear, no third launch, and the host waits for nothing.
Shapes: N rows, C columns, P columns of the turned matrix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_dhellam.kernels.fp8.reference import FORWARD, LARGEST, SIDE, SMALLEST, Block, Cast
from lightning_dhellam.kernels.launch import blocks, interpreted
from lightning_dhellam.kernels.linear.processors import processors

_BLOCK = 8192
_PARTS = 1024
"""Most programs of the first pass."""

_SIDE = tl.constexpr(SIDE)
_SMALLEST = tl.constexpr(SMALLEST)


def largest(x: Tensor) -> Tensor:
    """Compute what `reference.largest` does."""
    return torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32).view(1)


def cast(x: Tensor, dtype: torch.dtype, block: Block = None) -> tuple[Cast, Cast]:
    """Compute what `reference.cast` does."""
    kept, turned = _launch(x, dtype, block, None, turns=True)
    assert turned is not None
    return kept, turned


def cast_rows(
    x: Tensor, dtype: torch.dtype, block: Block = None, largest: Tensor | None = None
) -> Cast:
    """Compute what `reference.cast_rows` does."""
    return _launch(x, dtype, block, largest, turns=False)[0]


def turn(matrix: Cast) -> Cast:
    """Compute what `reference.turn` does."""
    values, scale = matrix
    height, width = values.shape
    by_rows, down, across = scale.dim() == 2, blocks(height, SIDE), blocks(width, SIDE)
    pitch = down * SIDE if by_rows else blocks(height, 16) * 16
    turned, scale_turned = values.new_empty(width, pitch), scale
    if by_rows:
        scale_turned = scale.new_empty(down, width).t()
    if width:
        _turn[(max(1, down * across),)](
            values, scale, turned, scale_turned, height, width, pitch, across,
            *(scale.stride() if by_rows else (0, 0)), LARGEST[values.dtype], BY_ROWS=by_rows,
            MANTISSA=_mantissa(values.dtype), INTERPRETED=interpreted(), num_warps=8,
        )  # fmt: skip
    return Cast(turned, scale_turned)


def _fours(squares: int) -> int:
    """Scales from a row of squares to the next one: cuBLAS reads rows of whole fours."""
    return blocks(squares, 4) * 4


def _mantissa(dtype: torch.dtype) -> int:
    return 3 if dtype is FORWARD else 2


def _launch(
    x: Tensor, dtype: torch.dtype, block: Block, most: Tensor | None, *, turns: bool
) -> tuple[Cast, Cast | None]:
    # Tiles of fp32 come out otherwise from launch to launch, by Triton 3.6 on an H200.
    assert not x.is_cuda or x.itemsize == 2, f"a GPU casts numbers of 16 bits, not {x.dtype}"
    rows = x.contiguous().flatten(0, -2)
    height, width = rows.shape
    down, across = blocks(height, SIDE), blocks(width, SIDE)
    pitch = blocks(height, 16) * 16 if block is None else down * SIDE
    values = x.new_empty(height, width, dtype=dtype)
    turned = x.new_empty(width, pitch, dtype=dtype) if turns else values

    def numbers(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=x.device)

    found, parts = values, 0
    if block is None:
        scale = numbers(1)
        scale_turned = scale
        if most is None:
            parts = min(max(1, blocks(rows.numel(), _BLOCK)), _most(x.device))
            found = numbers(parts)
            _largest[(parts,)](rows, found, rows.numel(), parts, BLOCK=_BLOCK, num_warps=8)
        else:
            found, parts = most, len(most)
    elif block[0] == 1:
        scale = numbers(across, height).t()
        scale_turned = numbers(down, width).t() if turns else scale
    else:
        scale = numbers(down, _fours(across))[:, :across]
        scale_turned = numbers(across, _fours(down))[:, :down] if turns else scale
    if width:
        _cast[(max(1, down * across),)](
            rows, found, values, turned, scale, scale_turned, height, width, pitch, down, across,
            _fours(down), _fours(across), parts, LARGEST[dtype],
            PER=0 if block is None else 1 if block[0] == 1 else 2, PARTS=_PARTS,
            MANTISSA=_mantissa(dtype), INTERPRETED=interpreted(), TURNS=turns, num_warps=8,
        )  # fmt: skip
    return Cast(values, scale), Cast(turned, scale_turned) if turns else None


def _most(device: torch.device) -> int:
    """Programs of the first pass: as many as run at once."""
    return min(_PARTS, 4 * processors(device)) if device.type == "cuda" else 4


@triton.jit(do_not_specialize=["parts"])
def _largest(
    x: tl.tensor, found: tl.tensor, size: tl.tensor, parts: int, BLOCK: tl.constexpr
) -> None:
    program = tl.program_id(0)
    most = tl.zeros((BLOCK,), tl.float32)
    for step in range(tl.cdiv(size, parts * BLOCK)):
        here = (step * parts + program).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        wide = tl.load(x + here, mask=here < size, other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.abs(wide))
    tl.store(found + program, tl.max(most))


@triton.jit(do_not_specialize=["parts"])
def _cast(
    x: tl.tensor,
    found: tl.tensor,
    values: tl.tensor,
    turned: tl.tensor,
    scale: tl.tensor,
    scale_turned: tl.tensor,
    height: int,
    width: int,
    pitch: int,
    down: int,
    across: int,
    pitch_turned: int,
    pitch_scale: int,
    parts: int,
    most: float,
    PER: tl.constexpr,
    PARTS: tl.constexpr,
    MANTISSA: tl.constexpr,
    INTERPRETED: tl.constexpr,
    TURNS: tl.constexpr,
) -> None:
    """One square. A scale is `PER` tensor (0), row and column of the square (1), or square (2)."""
    program = tl.program_id(0)
    high, far = program // across, program % across
    row, column = high * _SIDE + tl.arange(0, _SIDE), far * _SIDE + tl.arange(0, _SIDE)
    tall, wide = row < height, column < width
    here = row[:, None].to(tl.int64) * width + column[None, :]
    read = tl.load(x + here, mask=tall[:, None] & wide[None, :], other=0.0).to(tl.float32)
    if PER == 0:
        part = tl.arange(0, PARTS)
        largest = tl.max(tl.load(found + part, mask=part < parts, other=0.0))
        factor, inverse = _scales(largest, most)
        if program == 0:
            tl.store(scale, factor)
        below = read * inverse
        above = below
    elif PER == 1:
        size = tl.abs(read)
        factor, inverse = _scales(tl.max(size, axis=1), most)
        tl.store(scale + far * height + row, factor, mask=tall)
        below = read * inverse[:, None]
        if TURNS:
            factor, inverse = _scales(tl.max(size, axis=0), most)
            tl.store(scale_turned + high * width + column, factor, mask=wide)
        above = read * inverse[None, :]
    else:
        factor, inverse = _scales(tl.max(tl.abs(read)), most)
        tl.store(scale + high * pitch_scale + far, factor)
        if TURNS:
            tl.store(scale_turned + far * pitch_turned + high, factor)
        below = read * inverse
        above = below
    dtype: tl.constexpr = values.dtype.element_ty
    kept = _rounded(below, most, dtype, MANTISSA, INTERPRETED)
    tl.store(values + here, kept, mask=tall[:, None] & wide[None, :])
    if TURNS:
        if PER == 1:
            kept = _rounded(above, most, dtype, MANTISSA, INTERPRETED)
        there = column[:, None].to(tl.int64) * pitch + row[None, :]
        tl.store(turned + there, tl.trans(kept), mask=wide[:, None] & (row < pitch)[None, :])


@triton.jit
def _turn(
    values: tl.tensor,
    scale: tl.tensor,
    turned: tl.tensor,
    scale_turned: tl.tensor,
    height: int,
    width: int,
    pitch: int,
    across: int,
    step_row: int,
    step_column: int,
    most: float,
    BY_ROWS: tl.constexpr,
    MANTISSA: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    """One square."""
    program = tl.program_id(0)
    high, far = program // across, program % across
    row, column = high * _SIDE + tl.arange(0, _SIDE), far * _SIDE + tl.arange(0, _SIDE)
    tall, wide = row < height, column < width
    here = row[:, None].to(tl.int64) * width + column[None, :]
    inside = tall[:, None] & wide[None, :]
    read = tl.where(inside, tl.load(values + here, mask=inside).to(tl.float32), 0.0)
    dtype: tl.constexpr = turned.dtype.element_ty
    if BY_ROWS:
        factor = tl.load(scale + row * step_row + far * step_column, mask=tall, other=0.0)
        read = read * factor[:, None]
        factor, inverse = _scales(tl.max(tl.abs(read), axis=0), most)
        tl.store(scale_turned + high * width + column, factor, mask=wide)
        kept = _rounded(read * inverse[None, :], most, dtype, MANTISSA, INTERPRETED)
    else:
        kept = read.to(dtype)
    there = column[:, None].to(tl.int64) * pitch + row[None, :]
    tl.store(turned + there, tl.trans(kept), mask=wide[:, None] & (row < pitch)[None, :])


@triton.jit
def _scales(largest: tl.tensor, most: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    known = largest > _SMALLEST
    safe = tl.where(known, largest, 1.0)
    return (
        tl.where(known, tl.div_rn(safe, most), 1.0),
        tl.where(known, tl.div_rn(most, safe), 1.0),
    )


@triton.jit
def _rounded(
    x: tl.tensor,
    most: tl.tensor,
    dtype: tl.constexpr,
    MANTISSA: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tensor:
    # Not `minimum` and `maximum`, which drop NaN: one in the result leaves the step out.
    x = tl.where(x > most, most, tl.where(x < -most, -most, x))
    if INTERPRETED:  # it rounds half up, and loses the carry
        bits = x.to(tl.int32, bitcast=True)
        last: tl.constexpr = 23 - MANTISSA
        bits = (bits + ((1 << (last - 1)) - 1) + ((bits >> last) & 1)) & ~((1 << last) - 1)
        small: tl.constexpr = 2.0**-6 if MANTISSA == 3 else 2.0**-14
        shift: tl.constexpr = 1.5 * 2.0 ** (23 - MANTISSA) * small
        x = tl.where(tl.abs(x) < small, (x + shift) - shift, bits.to(tl.float32, bitcast=True))
    return x.to(dtype)
