"""Triton: rotation and regrouping of heads in one pass.

A program takes one token with all its heads, so that the token's cosines and sines, the row of its
position in the tables, are read once.
Both directions are the same walk over the heads, between the grouped layout (Megatron's
projection) and queries, keys and values. The two halves of `cos` and `sin` [L, D] are equal, as
rotary tables have them; only the first is read.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lightning_dhellam.kernels.attention.heads import Heads, Parts
from lightning_dhellam.kernels.launch import power_of_two

_ELEMENTS = 1024
"""Of each half that a program holds at a time: one 16-byte load of a 16-bit type per thread."""


def forward(qkv: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, heads: Heads) -> Tensor:
    """Compute what `reference.forward` does."""
    qkv = qkv.contiguous()
    out = qkv.new_empty(qkv.shape)
    _launch(qkv, heads.split(out), positions, cos, sin, heads, forward=True)
    return out


def backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: Heads,
) -> Tensor:
    """Compute what `reference.backward` does.

    Of the gradients only the last dimension must be contiguous.
    """
    dq, dk, dv = (t if t.stride(-1) == 1 else t.contiguous() for t in (dq, dk, dv))
    s, b = dq.shape[:2]
    dqkv = dq.new_empty(s, b, heads.channels)
    _launch(dqkv, (dq, dk, dv), positions, cos, sin, heads, forward=False)
    return dqkv


def _launch(
    grouped: Tensor,
    parts: Parts,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: Heads,
    *,
    forward: bool,
) -> None:
    s, b, _ = grouped.shape
    q, k, v = parts
    half = power_of_two(heads.size // 2)
    most = max(1, _ELEMENTS // half)
    _walk[(s * b,)](
        grouped, q, k, v, positions.contiguous(), cos, sin, b,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        GROUPS=heads.groups, RATIO=heads.ratio, SIZE=heads.size, HALF=half,
        QUERIES=min(most, power_of_two(heads.queries)), KEYS=min(most, power_of_two(heads.groups)),
        FORWARD=forward, num_warps=4,
    )  # fmt: skip


@triton.jit
def _walk(
    grouped: tl.tensor,
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    positions: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
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
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    FORWARD: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    row, sample = token // batch, token % batch
    position = tl.load(positions + token)
    column = tl.arange(0, HALF)[None, :]
    real = column < SIZE // 2
    c = tl.load(cos + position * SIZE + column, mask=real, other=1.0)
    s = tl.load(sin + position * SIZE + column, mask=real, other=0.0)
    here = grouped + token * GROUPS * (RATIO + 2) * SIZE + column
    here_q = q + row * q_s + sample * q_b + column
    here_k = k + row * k_s + sample * k_b + column
    here_v = v + row * v_s + sample * v_b + column
    for first in tl.static_range(0, GROUPS * RATIO, QUERIES):
        head = first + tl.arange(0, QUERIES)[:, None]
        place = here + (head // RATIO * (RATIO + 2) + head % RATIO) * SIZE
        _move(place, here_q + head * q_h, real & (head < GROUPS * RATIO), c, s, SIZE, FORWARD)
    for first in tl.static_range(0, GROUPS, KEYS):
        head = first + tl.arange(0, KEYS)[:, None]
        inside = real & (head < GROUPS)
        place = here + (head * (RATIO + 2) + RATIO) * SIZE
        _move(place, here_k + head * k_h, inside, c, s, SIZE, FORWARD)
        # Values do not turn: they are multiplied by 1 and 0.
        _move(place + SIZE, here_v + head * v_h, inside, c * 0 + 1, s * 0, SIZE, FORWARD)


@triton.jit
def _move(
    grouped: tl.tensor,
    part: tl.tensor,
    inside: tl.tensor,
    c: tl.tensor,
    s: tl.tensor,
    SIZE: tl.constexpr,
    FORWARD: tl.constexpr,
) -> None:
    """Turn heads on their way from `grouped` to `part`, or back on the way back."""
    if FORWARD:
        source, target, turn = grouped, part, s
    else:
        source, target, turn = part, grouped, -s
    a = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + SIZE // 2, mask=inside, other=0.0).to(tl.float32)
    kind = target.dtype.element_ty
    tl.store(target, (a * c - b * turn).to(kind), mask=inside)
    tl.store(target + SIZE // 2, (b * c + a * turn).to(kind), mask=inside)
