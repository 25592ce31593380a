"""Triton: all groups in one launch, whose sizes stay on the device.

As many programs as there are multiprocessors go through the tiles of all groups. Operands come
through the tensor memory accelerator, which puts zeros where a group's rows end. Tiles of a group
follow each other in small squares, whose operands stay in the L2 cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor, load_ragged, to_ragged_indices

from lightning_dhellam.kernels.grouped import reference
from lightning_dhellam.kernels.grouped.biases import add_bias_, bias_grad
from lightning_dhellam.kernels.grouped.reference import SHRINKS
from lightning_dhellam.kernels.grouped.tables import fits, places_of
from lightning_dhellam.kernels.launch import blocks, interpreted, power_of_two
from lightning_dhellam.kernels.linear.processors import used
from lightning_dhellam.kernels.tiles import expect, put, tile_of

__all__ = ["SHRINKS", "add_bias_", "bias_grad", "data_grad", "forward", "weight_grad"]


@dataclass(frozen=True)
class Tiles:
    """How a program computes.

    Attributes:
        rows: of a tile of the result.
        columns: of it.
        depth: of what is multiplied at a time.
        swizzle: rows of tiles of a square whose tiles follow each other.
        pieces: in which a tile of a weight's gradient is written: each takes shared memory.
        warps: of a program.
        stages: tiles of operands that are under way.
    """

    rows: int
    columns: int
    depth: int
    swizzle: int
    pieces: int
    warps: int
    stages: int

    def constants(self) -> dict[str, Any]:
        """What a kernel is compiled for."""
        return {
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "DEPTH": self.depth,
            "SWIZZLE": self.swizzle,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# 16 experts of 6400 x 4096 on one H200, 512 to 1833 rows each: forward 729 TFLOP/s (a loop of mm
# 659, torch's grouped_mm 642), gradient by the input 651 (709, 620), weight gradient 529 (a loop of
# addmm into fp32 388).
FORWARD = Tiles(128, 256, 64, 8, 1, 8, 3)
DATA_GRAD = Tiles(128, 256, 64, 8, 1, 8, 3)
WEIGHT_GRAD = Tiles(128, 256, 64, 8, 4, 8, 4)
WIDE = Tiles(64, 64, 32, 8, 1, 4, 2)
"""Of operands in fp32, which are multiplied in true fp32."""


def forward(
    x: Tensor, weights: Sequence[Tensor], ends: Tensor, rows: Sequence[int] | None = None
) -> Tensor:
    """Compute what `reference.forward` does."""
    x = x.contiguous()
    if not len(x) or not fits(x, *weights) or not _whole(weights[0].shape[0], x):
        return reference.forward(x, weights, ends, rows)
    return _products(x, weights, ends, FORWARD, turned=False)


def data_grad(
    dy: Tensor, weights: Sequence[Tensor], ends: Tensor, rows: Sequence[int] | None = None
) -> Tensor:
    """Compute what `reference.data_grad` does."""
    dy = dy.contiguous()
    if not len(dy) or not fits(dy, *weights):
        return reference.data_grad(dy, weights, ends, rows)
    return _products(dy, weights, ends, DATA_GRAD, turned=True)


def weight_grad(
    dy: Tensor,
    x: Tensor,
    grads: Sequence[Tensor],
    fresh: Sequence[bool],
    ends: Tensor,
    rows: Sequence[int] | None = None,
) -> None:
    """Compute what `reference.weight_grad` does.

    Gradients in fp32 are added to where they lie: by the L2 cache, while the next tile is computed.
    """
    dy, x = dy.contiguous(), x.contiguous()
    if not len(x) or not fits(dy, x, *grads):
        reference.weight_grad(dy, x, grads, fresh, ends, rows)
        return
    tiles = WEIGHT_GRAD if dy.itemsize == 2 else WIDE
    places = places_of(grads, fresh)
    shape = grads[0].shape
    down, across = blocks(shape[0], tiles.rows), blocks(shape[1], tiles.columns)
    most = len(grads) * down * across
    programs = _programs(most, x.device)
    _add_products[(programs,)](
        create_ragged_descriptor(dy, [tiles.depth, tiles.rows]),
        create_ragged_descriptor(x, [tiles.depth, tiles.columns]),
        places.array((tiles.rows, tiles.columns // tiles.pieces)),
        places.table, places.first, places.pitch, *shape, ends, len(grads), programs, down, across,
        REDUCES=grads[0].dtype is torch.float32 and not interpreted(), PIECES=tiles.pieces,
        LANES=power_of_two(len(grads)), INTERPRETED=interpreted(), **tiles.constants(),
    )  # fmt: skip


def _products(
    x: Tensor, weights: Sequence[Tensor], ends: Tensor, tiles: Tiles, *, turned: bool
) -> Tensor:
    """`x` [R, D] times the weight of each row's group, which is [O, D], or [D, O] if `turned`."""
    tiles = tiles if x.itemsize == 2 else WIDE
    width = weights[0].shape[1 if turned else 0]
    y = x.new_empty(len(x), width)
    block = (tiles.depth, tiles.columns) if turned else (tiles.columns, tiles.depth)
    places = places_of(weights)
    across = blocks(width, tiles.columns)
    most = (blocks(len(x), tiles.rows) + len(weights)) * across
    programs = _programs(most, x.device)
    _multiply[(programs,)](
        create_ragged_descriptor(x, [tiles.rows, tiles.depth]),
        places.array(block), places.table,
        create_ragged_descriptor(y, [tiles.rows, tiles.columns]),
        ends, len(weights), programs, across, blocks(x.shape[1], tiles.depth),
        LANES=power_of_two(len(weights)), TURNED=turned, INTERPRETED=interpreted(),
        **tiles.constants(),
    )  # fmt: skip
    return y


def _whole(width: int, x: Tensor) -> bool:
    """Whether rows of `width` results can be written as descriptors say."""
    return width * x.itemsize % 16 == 0


def _programs(most: int, device: torch.device) -> int:
    """One for each multiprocessor, as far as there is work."""
    return min(most, used(device) if device.type == "cuda" else 4)


@triton.jit
def _dot(a: tl.tensor, b: tl.tensor, total: tl.tensor, INTERPRETED: tl.constexpr) -> tl.tensor:
    if INTERPRETED:  # it would multiply the bits of bf16, as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit(do_not_specialize=["programs"])
def _multiply(
    x: tl.tensor,
    weights: tl.tensor,
    table: tl.tensor,
    y: tl.tensor,
    ends: tl.tensor,
    groups: int,
    programs: int,
    across: int,
    steps: int,
    LANES: tl.constexpr,
    TURNED: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SWIZZLE: tl.constexpr,
) -> None:
    lane = tl.arange(0, LANES)
    starts = tl.load(ends + lane - 1, mask=(lane > 0) & (lane < groups), other=0)
    sizes = tl.load(ends + lane, mask=lane < groups, other=0) - starts
    bands = tl.where(lane < groups, tl.cdiv(sizes, ROWS), 0)
    upto = tl.cumsum(bands * across, axis=0)
    for tile in tl.range(tl.program_id(0), tl.sum(bands) * across, programs, flatten=True):
        group = tl.sum((upto <= tile).to(tl.int32))
        mine = lane == group
        start = tl.sum(tl.where(mine, starts, 0))
        size = tl.sum(tl.where(mine, sizes, 0))
        before = tl.sum(tl.where(mine, upto - bands * across, 0))
        row, column = tile_of(tile - before, tl.cdiv(size, ROWS), across, SWIZZLE)
        place = tl.load(table + group)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in range(steps):
            a = load_ragged(x, start, size, [row * ROWS, step * DEPTH])
            if TURNED:
                b = weights.load([place, step * DEPTH, column * COLUMNS])
                b = tl.reshape(b, (DEPTH, COLUMNS))
            else:
                b = weights.load([place, column * COLUMNS, step * DEPTH])
                b = tl.reshape(b, (COLUMNS, DEPTH)).T
            total = _dot(a, b, total, INTERPRETED)
        result = tl.reshape(total.to(y.dtype), (1, 1, ROWS, COLUMNS))
        # Not `store_ragged`, which Triton's interpreter does not know how to run.
        far, last, at = to_ragged_indices(start, size, row * ROWS)
        y.store([far, last, at, column * COLUMNS], result)


@triton.jit
def _add_products(
    dy: tl.tensor,
    x: tl.tensor,
    grads: tl.tensor,
    table: tl.tensor,
    base: tl.tensor,
    pitch: tl.tensor,
    height: int,
    width: int,
    ends: tl.tensor,
    groups: int,
    programs: int,
    down: int,
    across: int,
    REDUCES: tl.constexpr,
    PIECES: tl.constexpr,
    LANES: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SWIZZLE: tl.constexpr,
) -> None:
    each = down * across
    lane = tl.arange(0, LANES)
    ends_here = tl.load(ends + lane, mask=lane < groups, other=0)
    sizes = ends_here - tl.load(ends + lane - 1, mask=(lane > 0) & (lane < groups), other=0)
    # A group without rows is one step of zeros.
    steps = tl.where(lane < groups, tl.maximum(tl.cdiv(sizes, DEPTH), 1), 0)
    program = tl.program_id(0)
    before = tl.cdiv(lane * each - program, programs)
    tiles = tl.cdiv((lane + 1) * each - program, programs) - before
    # One loop over the steps of all tiles, so that loads of the next tile begin while one ends.
    tile, step, last = program - programs, -1, -1
    group, row, column, start, size = 0, 0, 0, 0, 0
    writes, expects = programs < 0, programs < 0
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(tl.sum(tiles * steps)):
        step = tl.where(step == last, 0, step + 1)
        if step == 0:
            tile += programs
            group = tile // each
            row, column = tile_of(tile - group * each, down, across, SWIZZLE)
            size = tl.sum(tl.where(lane == group, sizes, 0))
            start = tl.sum(tl.where(lane == group, ends_here, 0)) - size
            last = tl.maximum(tl.cdiv(size, DEPTH), 1) - 1
            fresh = tl.load(table + groups + group) != 0
            writes = (size > 0) | fresh
            expects = (size > 0) & (fresh == 0)
        if (step == last // 2) & expects:
            place = tl.load(table + group)
            here = base + place.to(tl.int64) * pitch
            expect(here, height, width, row * ROWS, column * COLUMNS, REDUCES, ROWS, COLUMNS)
        a = load_ragged(dy, start, size, [step * DEPTH, row * ROWS])
        b = load_ragged(x, start, size, [step * DEPTH, column * COLUMNS])
        total = _dot(a.T, b, total, INTERPRETED)
        if (step == last) & writes:
            place = tl.load(table + group)
            fresh = tl.load(table + groups + group) != 0
            put(grads, place, row * ROWS, column * COLUMNS, total, fresh, REDUCES, PIECES)
            total = tl.zeros((ROWS, COLUMNS), tl.float32)
