"""Triton: weight gradients of two operands in 8 bits are added to fp32 where they lie.

Products of operands with one scale each are computed here if they are gradients of weights, and by
cuBLAS otherwise. As many programs as there are multiprocessors go through the tiles; operands come
and gradients go through the tensor memory accelerator, so that nothing waits for what is added.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lightning_dhellam.kernels.fp8 import cublas, reference
from lightning_dhellam.kernels.fp8.casts import cast, cast_rows, largest, turn
from lightning_dhellam.kernels.fp8.reference import SHRINKS, Cast
from lightning_dhellam.kernels.grouped.tables import fits
from lightning_dhellam.kernels.launch import blocks, interpreted
from lightning_dhellam.kernels.linear.processors import used
from lightning_dhellam.kernels.tiles import expect, put, tile_of

__all__ = ["SHRINKS", "accumulate", "cast", "cast_rows", "largest", "multiply", "turn"]

_ROWS, _COLUMNS, _DEPTH = 128, 128, 128
_PIECES = 2
"""In which a tile of the gradient goes: each takes shared memory."""


def multiply(
    a: Cast, b: Cast, dtype: torch.dtype, bias: Tensor | None = None, *, fast: bool = False
) -> Tensor:
    """Compute what `reference.multiply` does."""
    if not a.values.is_cuda:
        return reference.multiply(a, b, dtype, bias, fast=fast)
    return cublas.multiply(a, b, dtype, bias, fast=fast)


def accumulate(grad: Tensor, a: Cast, b: Cast, *, first: bool = False) -> None:
    """Compute what `reference.accumulate` does: sums of `_DEPTH` products are added up in fp32."""
    if a.scale.dim() == 2 or not fits(a.values, b.values, grad):
        other = cublas if grad.is_cuda else reference
        other.accumulate(grad, a, b, first=first)
        return
    (height, depth), width = a.values.shape, len(b.values)
    down, across = blocks(height, _ROWS), blocks(width, _COLUMNS)
    programs = min(down * across, used(grad.device) if grad.is_cuda else 4)
    _add_product[(programs,)](
        TensorDescriptor.from_tensor(a.values, [_ROWS, _DEPTH]),
        TensorDescriptor.from_tensor(b.values, [_COLUMNS, _DEPTH]),
        TensorDescriptor.from_tensor(grad[None], [1, _ROWS, _COLUMNS // _PIECES]),
        grad, a.scale, b.scale, height, width, blocks(depth, _DEPTH), programs, down, across,
        FRESH=first, REDUCES=grad.dtype is torch.float32 and not interpreted(), PIECES=_PIECES,
        ROWS=_ROWS, COLUMNS=_COLUMNS, DEPTH=_DEPTH, SWIZZLE=8, num_warps=8, num_stages=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["programs"])
def _add_product(
    a: tl.tensor,
    b: tl.tensor,
    grads: tl.tensor,
    grad: tl.tensor,
    scale_a: tl.tensor,
    scale_b: tl.tensor,
    height: int,
    width: int,
    steps: int,
    programs: int,
    down: int,
    across: int,
    FRESH: tl.constexpr,
    REDUCES: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SWIZZLE: tl.constexpr,
) -> None:
    scale = tl.load(scale_a) * tl.load(scale_b)
    for tile in tl.range(tl.program_id(0), down * across, programs, flatten=True):
        high, far = tile_of(tile, down, across, SWIZZLE)
        row, column = high * ROWS, far * COLUMNS
        if not FRESH:
            expect(grad, height, width, row, column, REDUCES, ROWS, COLUMNS)
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in range(steps):
            left = a.load([row, step * DEPTH])
            right = b.load([column, step * DEPTH])
            # Hopper keeps 14 bits of a running sum of 8-bit products: fp32 takes over each time.
            total = tl.dot(left, right.T, total, max_num_imprecise_acc=DEPTH)
        put(grads, 0, row, column, total * scale, FRESH, REDUCES, PIECES)
