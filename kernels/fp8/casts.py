"""Triton: a matrix in 8 bits, as it is and turned, in one pass; with a scale of all of it in two.

The first pass leaves the largest number of each program, and every program of the second takes the
largest of those: there is nothing to clear, no third launch, and the host waits for nothing. What
made the matrix may have left them already.

A program has a square of which four rows make words, each of four numbers that are neighbours in
the turned matrix: words are turned, not bytes, which takes half the time. Shapes: N rows, C
columns, P columns of the turned matrix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_dhellam.kernels.fp8.reference import FORWARD, LARGEST, SIDE, SMALLEST, Block, Cast
from lightning_dhellam.kernels.launch import PARTS, blocks, interpreted, part_programs

_BLOCK = 8192

_SIDE = tl.constexpr(SIDE)
_SMALLEST = tl.constexpr(SMALLEST)

_PACKS = """
    {
    .reg .b16 %low, %high;
    cvt.rn.satfinite.KINDx2.f32 %low, $2, $1;
    cvt.rn.satfinite.KINDx2.f32 %high, $4, $3;
    mov.b32 $0, {%low, %high};
    }
"""
_PACKS_E4M3 = tl.constexpr(_PACKS.replace("KIND", "e4m3"))
_PACKS_E5M2 = tl.constexpr(_PACKS.replace("KIND", "e5m2"))


def largest(x: Tensor) -> Tensor:
    """Compute what `reference.largest` does."""
    return torch.linalg.vector_norm(x, torch.inf, dtype=torch.float32).view(1)


def largest_of_parts(x: Tensor) -> Tensor:
    """The largest absolute values of parts of `x`, fp32: one for each program."""
    parts = min(max(1, blocks(x.numel(), _BLOCK)), part_programs(x.device))
    found = torch.empty(parts, dtype=torch.float32, device=x.device)
    _largest[(parts,)](x, found, x.numel(), parts, BLOCK=_BLOCK, num_warps=8)
    return found


def cast(
    x: Tensor, dtype: torch.dtype, block: Block = None, largest: Tensor | None = None
) -> tuple[Cast, Cast]:
    """Compute what `reference.cast` does."""
    kept, turned = _launch(x, dtype, block, largest, turns=True)
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
        found = largest_of_parts(rows) if most is None else most
        parts = len(found)
        assert parts <= PARTS, f"{parts} parts have a largest number, which is more than {PARTS}"
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
            PER=0 if block is None else 1 if block[0] == 1 else 2, PARTS=PARTS,
            MANTISSA=_mantissa(dtype), INTERPRETED=interpreted(), TURNS=turns,
            # Each thread divides by the scales of its columns, so few of them share a square.
            num_warps=4,
        )  # fmt: skip
    return Cast(values, scale), Cast(turned, scale_turned) if turns else None


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
    four, column = tl.arange(0, _SIDE // 4), far * _SIDE + tl.arange(0, _SIDE)
    row, wide = high * _SIDE + 4 * four, column < width
    here = row[:, None].to(tl.int64) * width + column[None, :]
    x0 = _read(x, here, row, height, wide)
    x1 = _read(x, here + width, row + 1, height, wide)
    x2 = _read(x, here + 2 * width, row + 2, height, wide)
    x3 = _read(x, here + 3 * width, row + 3, height, wide)
    dtype: tl.constexpr = values.dtype.element_ty
    there = column[:, None].to(tl.int64) * (pitch // 4) + (high * (_SIDE // 4) + four)[None, :]
    padded = wide[:, None] & (row < pitch)[None, :]
    words = turned.to(tl.pointer_type(tl.int32)) + there
    if PER == 1:
        if TURNS:
            factor, inverse = _scales(tl.max(_size(x0, x1, x2, x3), axis=0), most)
            tl.store(scale_turned + high * width + column, factor, mask=wide)
            above = inverse[None, :]
            word = _word(
                x0 * above, x1 * above, x2 * above, x3 * above, dtype, MANTISSA, INTERPRETED
            )
            tl.store(words, tl.trans(word), mask=padded)
        scales = scale + far * height + row
        k0 = _by_row(x0, scales, row, height, most, dtype, MANTISSA, INTERPRETED)
        k1 = _by_row(x1, scales + 1, row + 1, height, most, dtype, MANTISSA, INTERPRETED)
        k2 = _by_row(x2, scales + 2, row + 2, height, most, dtype, MANTISSA, INTERPRETED)
        k3 = _by_row(x3, scales + 3, row + 3, height, most, dtype, MANTISSA, INTERPRETED)
    else:
        if PER == 0:
            part = tl.arange(0, PARTS)
            largest = tl.max(tl.load(found + part, mask=part < parts, other=0.0))
            factor, inverse = _scales(largest, most)
            if program == 0:
                tl.store(scale, factor)
        else:
            factor, inverse = _scales(tl.max(_size(x0, x1, x2, x3)), most)
            tl.store(scale + high * pitch_scale + far, factor)
            if TURNS:
                tl.store(scale_turned + far * pitch_turned + high, factor)
        x0, x1, x2, x3 = x0 * inverse, x1 * inverse, x2 * inverse, x3 * inverse
        k0 = _rounded(x0, dtype, MANTISSA, INTERPRETED)
        k1 = _rounded(x1, dtype, MANTISSA, INTERPRETED)
        k2 = _rounded(x2, dtype, MANTISSA, INTERPRETED)
        k3 = _rounded(x3, dtype, MANTISSA, INTERPRETED)
        if TURNS:
            word = _word(x0, x1, x2, x3, dtype, MANTISSA, INTERPRETED)
            tl.store(words, tl.trans(word), mask=padded)
    kept = values + here
    tl.store(kept, k0, mask=(row < height)[:, None] & wide[None, :])
    tl.store(kept + width, k1, mask=(row + 1 < height)[:, None] & wide[None, :])
    tl.store(kept + 2 * width, k2, mask=(row + 2 < height)[:, None] & wide[None, :])
    tl.store(kept + 3 * width, k3, mask=(row + 3 < height)[:, None] & wide[None, :])


@triton.jit
def _read(x: tl.tensor, here: tl.tensor, row: tl.tensor, height: int, wide: tl.tensor) -> tl.tensor:
    inside = (row < height)[:, None] & wide[None, :]
    return tl.load(x + here, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _size(x0: tl.tensor, x1: tl.tensor, x2: tl.tensor, x3: tl.tensor) -> tl.tensor:
    """The largest absolute value of each four."""
    return tl.maximum(tl.maximum(tl.abs(x0), tl.abs(x1)), tl.maximum(tl.abs(x2), tl.abs(x3)))


@triton.jit
def _by_row(
    x: tl.tensor,
    scale: tl.tensor,
    row: tl.tensor,
    height: int,
    most: float,
    dtype: tl.constexpr,
    MANTISSA: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tensor:
    """`x` in 8 bits, with a scale of each row."""
    factor, inverse = _scales(tl.max(tl.abs(x), axis=1), most)
    tl.store(scale, factor, mask=row < height)
    return _rounded(x * inverse[:, None], dtype, MANTISSA, INTERPRETED)


@triton.jit
def _word(
    x0: tl.tensor,
    x1: tl.tensor,
    x2: tl.tensor,
    x3: tl.tensor,
    dtype: tl.constexpr,
    MANTISSA: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tensor:
    """Four numbers in 8 bits in one of 32, the first one first in memory.

    The instruction rounds two at once. What Triton 3.7 makes of shifted bytes its assembler, of
    CUDA 12.8, cannot compile; what 3.6 makes of them gave other bits on an H200.
    """
    if INTERPRETED:
        word = _byte(x0, dtype, MANTISSA)
        word |= _byte(x1, dtype, MANTISSA) << 8
        word |= _byte(x2, dtype, MANTISSA) << 16
        word |= _byte(x3, dtype, MANTISSA) << 24
    else:
        packs: tl.constexpr = _PACKS_E4M3 if MANTISSA == 3 else _PACKS_E5M2
        word = tl.inline_asm_elementwise(
            packs, "=r,f,f,f,f", [x0, x1, x2, x3], dtype=tl.int32, is_pure=True, pack=1
        )
    return word


@triton.jit
def _byte(x: tl.tensor, dtype: tl.constexpr, MANTISSA: tl.constexpr) -> tl.tensor:
    return _rounded(x, dtype, MANTISSA, True).to(tl.uint8, bitcast=True).to(tl.int32)


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
        kept = _rounded(read * inverse[None, :], dtype, MANTISSA, INTERPRETED)
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
    dtype: tl.constexpr,
    MANTISSA: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tensor:
    # Nothing is larger than the type's largest by more than a rounding, which is too little to be
    # rounded up; NaN stays, and leaves the step out.
    if INTERPRETED:  # it rounds half up, and loses the carry
        bits = x.to(tl.int32, bitcast=True)
        last: tl.constexpr = 23 - MANTISSA
        bits = (bits + ((1 << (last - 1)) - 1) + ((bits >> last) & 1)) & ~((1 << last) - 1)
        small: tl.constexpr = 2.0**-6 if MANTISSA == 3 else 2.0**-14
        shift: tl.constexpr = 1.5 * 2.0 ** (23 - MANTISSA) * small
        x = tl.where(tl.abs(x) < small, (x + shift) - shift, bits.to(tl.float32, bitcast=True))
    return x.to(dtype)
