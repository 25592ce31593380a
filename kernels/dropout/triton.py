"""Triton: the mask is drawn in registers, four elements from each counter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_dhellam.kernels.dropout.philox import SPAN, threshold
from lightning_dhellam.kernels.dropout.reference import Columns, derive_key
from lightning_dhellam.kernels.launch import blocks

__all__ = ["backward", "derive_key", "forward", "forward_add"]


def forward(
    x: Tensor, p: float, key: int, places: Tensor | None = None, columns: Columns = None
) -> Tensor:
    """Compute what `reference.forward` does."""
    return _launch(x, None, p, key, places, columns)


def forward_add(
    x: Tensor, residual: Tensor, p: float, key: int, places: Tensor | None = None
) -> Tensor:
    """Compute what `reference.forward_add` does."""
    return _launch(x, residual.contiguous(), p, key, places, None)


def backward(
    dy: Tensor, p: float, key: int, places: Tensor | None = None, columns: Columns = None
) -> Tensor:
    """Compute what `reference.backward` does."""
    return _launch(dy, None, p, key, places, columns)


def _launch(
    x: Tensor,
    residual: Tensor | None,
    p: float,
    key: int,
    places: Tensor | None,
    columns: Columns,
) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    scale = 1 / (1 - p) if p < 1 else 0.0
    rows = x.shape[0]
    width = x.numel() // rows
    first, whole = columns or (0, width)
    before = first // (4 * SPAN)
    own = blocks(first + width, 4 * SPAN) - before
    _drop[(rows * own,)](
        x, x if residual is None else residual, out, x if places is None else places.contiguous(),
        width, first, before, own, blocks(whole, 4 * SPAN), key, threshold(p), scale,
        ADDS=residual is not None, PART=columns is not None, PLACED=places is not None,
        WIDTH=SPAN, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["key", "limit"])
def _drop(
    x: tl.tensor,
    residual: tl.tensor,
    out: tl.tensor,
    places: tl.tensor,
    size: tl.tensor,
    first: int,
    before: int,
    own: int,
    across: int,
    key: tl.tensor,
    limit: tl.tensor,
    scale: float,
    ADDS: tl.constexpr,
    PART: tl.constexpr,
    PLACED: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    row = (tl.program_id(0) // own).to(tl.int64)
    block = before + tl.program_id(0) % own
    place = row
    if PLACED:
        place = tl.load(places + row)
    x, residual, out = x + row * size, residual + row * size, out + row * size
    lane = tl.arange(0, WIDTH)
    start = block * 4 * WIDTH + lane - first
    # All loads are under way while the words are drawn.
    x0, r0 = _read(x, residual, start, size, ADDS, PART)
    x1, r1 = _read(x, residual, start + WIDTH, size, ADDS, PART)
    x2, r2 = _read(x, residual, start + 2 * WIDTH, size, ADDS, PART)
    x3, r3 = _read(x, residual, start + 3 * WIDTH, size, ADDS, PART)
    a, b, c, d = tl.randint4x(key.to(tl.int64), (place * across + block) * WIDTH + lane)
    _write(out, start, x0, r0, a, size, limit, scale, ADDS, PART)
    _write(out, start + WIDTH, x1, r1, b, size, limit, scale, ADDS, PART)
    _write(out, start + 2 * WIDTH, x2, r2, c, size, limit, scale, ADDS, PART)
    _write(out, start + 3 * WIDTH, x3, r3, d, size, limit, scale, ADDS, PART)


@triton.jit
def _read(
    x: tl.tensor,
    residual: tl.tensor,
    here: tl.tensor,
    size: tl.tensor,
    ADDS: tl.constexpr,
    PART: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    inside = _inside(here, size, PART)
    value = tl.load(x + here, mask=inside, other=0.0)
    branch = value
    if ADDS:
        branch = tl.load(residual + here, mask=inside, other=0.0)
    return value, branch


@triton.jit
def _write(
    out: tl.tensor,
    here: tl.tensor,
    value: tl.tensor,
    branch: tl.tensor,
    word: tl.tensor,
    size: tl.tensor,
    limit: tl.tensor,
    scale: float,
    ADDS: tl.constexpr,
    PART: tl.constexpr,
) -> None:
    result = value.to(tl.float32) * tl.where(word.to(tl.int64) >= limit, scale, 0.0)
    if ADDS:
        result += branch.to(tl.float32)
    tl.store(out + here, result.to(out.dtype.element_ty), mask=_inside(here, size, PART))


@triton.jit
def _inside(here: tl.tensor, size: tl.tensor, PART: tl.constexpr) -> tl.tensor:
    inside = here < size
    if PART:
        inside = inside & (here >= 0)
    return inside
