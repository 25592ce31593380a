"""Triton: rotation and regrouping of heads in one pass.

An item is one head of one token. Its place in the grouped layout (Megatron's projection) and in
the split layout (queries, keys, values) follow from each other, so both directions are one read
and one write. The two halves of `cos` and `sin` [S, D] are equal, as rotary tables have them; only
the first is read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lightning_dhellam.kernels.launch import blocks, power_of_two
from lightning_dhellam.kernels.rope.reference import Heads, split

__all__ = ["Heads", "backward", "forward", "split"]

_ELEMENTS = 2048
"""Of each half that a program rotates."""


def forward(qkv: Tensor, cos: Tensor, sin: Tensor, heads: Heads) -> Tensor:
    """As `reference.forward`."""
    qkv = qkv.contiguous()
    s, b, width = qkv.shape
    out = qkv.new_empty(s, b, width)
    items = s * b * (heads.queries + 2 * heads.groups)
    half, tile = _shape(heads)
    _forward[(blocks(items, tile),)](
        qkv, out, cos, sin, items, b,
        GROUPS=heads.groups, RATIO=heads.ratio, SIZE=heads.size, HALF=half, TILE=tile, num_warps=4,
    )  # fmt: skip
    return out


def backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, heads: Heads) -> Tensor:
    """As `reference.backward`; only the last dimension of the gradients must be contiguous."""
    dq, dk, dv = (t if t.stride(-1) == 1 else t.contiguous() for t in (dq, dk, dv))
    s, b = dq.shape[:2]
    channels = heads.queries + 2 * heads.groups
    dqkv = dq.new_empty(s, b, channels * heads.size)
    items = s * b * channels
    half, tile = _shape(heads)
    _backward[(blocks(items, tile),)](
        dq, dk, dv, dqkv, cos, sin, items, b,
        *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
        GROUPS=heads.groups, RATIO=heads.ratio, SIZE=heads.size, HALF=half, TILE=tile, num_warps=4,
    )  # fmt: skip
    return dqkv


def _shape(heads: Heads) -> tuple[int, int]:
    """Padded half of a head, and items of a program."""
    half = power_of_two(heads.size // 2)
    return half, max(1, _ELEMENTS // half)


@triton.jit
def _forward(
    qkv: tl.tensor,
    out: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    items: int,
    batch: int,
    GROUPS: tl.constexpr,
    RATIO: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    CHANNELS: tl.constexpr = GROUPS * (RATIO + 2)
    item = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    token, head = item // CHANNELS, item % CHANNELS
    is_query = head < GROUPS * RATIO
    other = head - GROUPS * RATIO
    grouped = tl.where(
        is_query,
        head // RATIO * (RATIO + 2) + head % RATIO,
        other % GROUPS * (RATIO + 2) + RATIO + other // GROUPS,
    )
    column = tl.arange(0, HALF)
    inside = (item < items)[:, None] & (column < SIZE // 2)[None, :]
    turns = inside & (head < GROUPS * (RATIO + 1))[:, None]
    table = (token // batch * SIZE)[:, None] + column[None, :]
    c = tl.load(cos + table, mask=turns, other=1.0)
    s = tl.load(sin + table, mask=turns, other=0.0)
    read = qkv + ((token * CHANNELS + grouped) * SIZE)[:, None] + column[None, :]
    first = tl.load(read, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(read + SIZE // 2, mask=inside, other=0.0).to(tl.float32)
    write = out + (item * SIZE)[:, None] + column[None, :]
    tl.store(write, (first * c - second * s).to(out.dtype.element_ty), mask=inside)
    tl.store(write + SIZE // 2, (second * c + first * s).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    dq: tl.tensor,
    dk: tl.tensor,
    dv: tl.tensor,
    dqkv: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    items: int,
    batch: int,
    q_s: int,
    q_b: int,
    q_h: int,
    k_s: int,
    k_b: int,
    k_h: int,
    v_s: int,
    v_b: int,
    v_h: int,
    GROUPS: tl.constexpr,
    RATIO: tl.constexpr,
    SIZE: tl.constexpr,
    HALF: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    CHANNELS: tl.constexpr = GROUPS * (RATIO + 2)
    item = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    token, channel = item // CHANNELS, item % CHANNELS
    position, sample = token // batch, token % batch
    group, part = channel // (RATIO + 2), channel % (RATIO + 2)
    column = tl.arange(0, HALF)
    inside = (item < items)[:, None] & (column < SIZE // 2)[None, :]
    turns = inside & (part <= RATIO)[:, None]
    table = (position * SIZE)[:, None] + column[None, :]
    c = tl.load(cos + table, mask=turns, other=1.0)
    s = tl.load(sin + table, mask=turns, other=0.0)
    at_q = position * q_s + sample * q_b + (group * RATIO + part) * q_h
    at_k = position * k_s + sample * k_b + group * k_h
    at_v = position * v_s + sample * v_b + group * v_h
    # One pointer for the three tensors would need a cast per item; two of three loads are masked.
    is_q = inside & (part < RATIO)[:, None]
    is_k = inside & (part == RATIO)[:, None]
    is_v = inside & (part > RATIO)[:, None]
    read_q = dq + at_q[:, None] + column[None, :]
    read_k = dk + at_k[:, None] + column[None, :]
    read_v = dv + at_v[:, None] + column[None, :]
    first = tl.load(read_q, mask=is_q, other=0.0).to(tl.float32)
    first += tl.load(read_k, mask=is_k, other=0.0).to(tl.float32)
    first += tl.load(read_v, mask=is_v, other=0.0).to(tl.float32)
    second = tl.load(read_q + SIZE // 2, mask=is_q, other=0.0).to(tl.float32)
    second += tl.load(read_k + SIZE // 2, mask=is_k, other=0.0).to(tl.float32)
    second += tl.load(read_v + SIZE // 2, mask=is_v, other=0.0).to(tl.float32)
    write = dqkv + (item * SIZE)[:, None] + column[None, :]
    tl.store(write, (first * c + second * s).to(dqkv.dtype.element_ty), mask=inside)
    tl.store(write + SIZE // 2, (second * c - first * s).to(dqkv.dtype.element_ty), mask=inside)
