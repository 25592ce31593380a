"""What Triton's GEMMs share: the order of their tiles, and how gradients are added to in place."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(
    local: tl.tensor, down: tl.tensor, across: tl.tensor, SWIZZLE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Row and column of a tile: squares of `SWIZZLE` rows, each column by column."""
    band = local // (SWIZZLE * across)
    high = tl.minimum(down - band * SWIZZLE, SWIZZLE)
    inside = local - band * SWIZZLE * across
    return band * SWIZZLE + inside % high, inside // high


@triton.jit
def expect(
    grad: tl.tensor,
    height: int,
    width: int,
    row: tl.tensor,
    column: tl.tensor,
    REDUCES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Ask for the tile that will be added to: the cache adds faster to what it has.

    In the middle of the tile's steps: 1.60 ms, where 1.87 is without and 1.91 at the first.
    """
    if REDUCES:
        rows = tl.minimum(row + tl.arange(0, ROWS), height - 1)[:, None].to(tl.int64)
        # 32 numbers in fp32 are a line of the cache.
        columns = tl.minimum(column + tl.arange(0, COLUMNS // 32) * 32, width - 1)[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [grad + rows * width + columns],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def put(
    grads: tl.tensor,
    place: tl.tensor,
    row: tl.tensor,
    column: tl.tensor,
    total: tl.tensor,
    fresh: tl.tensor,
    REDUCES: tl.constexpr,
    PIECES: tl.constexpr,
) -> None:
    """Write `total`, or add it, in pieces side by side."""
    if PIECES == 1:
        here = [place, row, column]
        value = tl.reshape(total, (1, total.shape[0], total.shape[1]))
        if fresh:
            grads.store(here, value.to(grads.dtype))
        elif REDUCES:
            grads.atomic_add(here, value)
        else:
            grads.store(here, (grads.load(here).to(tl.float32) + value).to(grads.dtype))
    else:
        HALF: tl.constexpr = total.shape[1] // 2
        halves = tl.reshape(total, (total.shape[0], 2, HALF))
        left, right = tl.split(tl.permute(halves, (0, 2, 1)))
        put(grads, place, row, column, left, fresh, REDUCES, PIECES // 2)
        put(grads, place, row, column + HALF, right, fresh, REDUCES, PIECES // 2)
