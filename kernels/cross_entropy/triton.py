"""Triton: one read of the logits for the statistics, one read and one write for the gradient.

Shapes: N tokens, V columns of this rank, of which the first `valid` are vocabulary.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_dhellam.kernels.cross_entropy.reference import CHUNK
from lightning_dhellam.kernels.launch import blocks

__all__ = ["CHUNK", "backward_", "combine", "statistics"]

_LANES, _DEEP = 512, 8
"""Columns of a round of the statistics: each lane takes 8 neighbours, 16 bytes in 16 bits."""

_BACKWARD_BLOCK = 2048
_COMBINE_BLOCK = 128


def statistics(logits: Tensor, labels: Tensor, first: int, valid: int) -> Tensor:
    """Compute what `reference.statistics` does; a row of -inf alone has the sum 0."""
    logits, labels = logits.contiguous(), labels.contiguous()
    rows, width = logits.shape
    out = torch.empty(3, rows, dtype=torch.float32, device=logits.device)
    _statistics[(rows,)](
        logits, labels, out, rows, width // _step(width), first, max(valid, 0),
        max(valid, 0) // (_LANES * _DEEP), STEP=_step(width), LANES=_LANES, DEEP=_DEEP, num_warps=8,
    )  # fmt: skip
    return out


def combine(statistics_of_ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Compute what `reference.combine` does."""
    statistics_of_ranks = statistics_of_ranks.contiguous()
    ranks, _, rows = statistics_of_ranks.shape
    loss, lse = (statistics_of_ranks.new_empty(rows) for _ in range(2))
    grid = (blocks(rows, _COMBINE_BLOCK),)
    _combine[grid](
        statistics_of_ranks, loss, lse, rows, RANKS=ranks, BLOCK=_COMBINE_BLOCK, num_warps=4
    )
    return loss, lse


def backward_(
    logits: Tensor, labels: Tensor, lse: Tensor, weights: Tensor, first: int, valid: int
) -> Tensor:
    """Compute what `reference.backward_` does."""
    assert logits.is_contiguous(), "logits are overwritten in place, so they must be contiguous"
    labels, lse, weights = labels.contiguous(), lse.contiguous(), weights.contiguous()
    rows, width = logits.shape
    across = blocks(width, _BACKWARD_BLOCK)
    _backward[(rows * across,)](
        logits, labels, lse, weights, width // _step(width), first, max(valid, 0), across,
        STEP=_step(width), BLOCK=_BACKWARD_BLOCK, num_warps=4,
    )  # fmt: skip
    return logits


def _step(width: int) -> int:
    """What rows start at multiples of, which Triton has to know for loads of 16 bytes."""
    return math.gcd(width, 16)


@triton.jit(do_not_specialize=["first"])
def _statistics(
    logits: tl.tensor,
    labels: tl.tensor,
    out: tl.tensor,
    rows: int,
    width: int,
    first: int,
    valid: int,
    rounds: int,
    STEP: tl.constexpr,
    LANES: tl.constexpr,
    DEEP: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * width * STEP
    columns = tl.arange(0, LANES)[:, None] * DEEP + tl.arange(0, DEEP)[None, :]
    # Each lane has a maximum of its own, so that lanes wait for each other only once, at the end.
    top = tl.full((LANES,), -float("inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    for step in range(rounds):
        x = tl.load(start + step * LANES * DEEP + columns).to(tl.float32)
        top, total = _include(x, top, total)
    rest = rounds * LANES * DEEP + columns
    x = tl.load(start + rest, mask=rest < valid, other=-float("inf")).to(tl.float32)
    top, total = _include(x, top, total)
    highest = tl.max(top)
    whole = tl.sum(total * tl.exp(top - _origin(highest)))
    label = tl.load(labels + row) - first
    mine = (label >= 0) & (label < valid)
    chosen = tl.load(start + label, mask=mine, other=0.0).to(tl.float32)
    tl.store(out + row, highest)
    tl.store(out + rows + row, whole)
    tl.store(out + 2 * rows + row, chosen)


@triton.jit
def _include(x: tl.tensor, top: tl.tensor, total: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Maximum and sum of exponentials of each lane after `x` [LANES, DEEP]."""
    higher = tl.maximum(top, tl.max(x, axis=1))
    origin = _origin(higher)
    total = total * tl.exp(top - origin) + tl.sum(tl.exp(x - origin[:, None]), axis=1)
    return higher, total


@triton.jit
def _origin(top: tl.tensor) -> tl.tensor:
    """What exponents are relative to: while all was -inf, not that, for -inf - -inf is NaN."""
    return tl.where(top == -float("inf"), 0.0, top)


@triton.jit
def _combine(
    statistics: tl.tensor,
    loss: tl.tensor,
    lse: tl.tensor,
    rows: int,
    RANKS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    highest = tl.full((BLOCK,), -float("inf"), tl.float32)
    for rank in range(RANKS):
        top = tl.load(statistics + 3 * rank * rows + row, mask=inside, other=-float("inf"))
        highest = tl.maximum(highest, top)
    total = tl.zeros((BLOCK,), tl.float32)
    label = tl.zeros((BLOCK,), tl.float32)
    for rank in range(RANKS):
        here = statistics + 3 * rank * rows + row
        top = tl.load(here, mask=inside, other=-float("inf"))
        total += tl.load(here + rows, mask=inside, other=0.0) * tl.exp(top - _origin(highest))
        label += tl.load(here + 2 * rows, mask=inside, other=0.0)
    whole = _origin(highest) + tl.log(total)
    tl.store(lse + row, whole, mask=inside)
    tl.store(loss + row, whole - label, mask=inside)


@triton.jit(do_not_specialize=["first"])
def _backward(
    logits: tl.tensor,
    labels: tl.tensor,
    lse: tl.tensor,
    weights: tl.tensor,
    width: int,
    first: int,
    valid: int,
    across: int,
    STEP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    row = (program // across).to(tl.int64)
    columns = program % across * BLOCK + tl.arange(0, BLOCK)
    hit = columns == tl.load(labels + row) - first
    lse_here, weight = tl.load(lse + row), tl.load(weights + row)
    here = logits + row * width * STEP + columns
    kind = logits.dtype.element_ty
    if (program % across + 1) * BLOCK <= valid:  # without masks, which break wide loads apart
        grad = tl.exp(tl.load(here).to(tl.float32) - lse_here) - tl.where(hit, 1.0, 0.0)
        tl.store(here, (grad * weight).to(kind))
    else:
        inside = columns < valid
        x = tl.load(here, mask=inside, other=-float("inf")).to(tl.float32)
        grad = tl.exp(x - lse_here) - tl.where(hit, 1.0, 0.0)
        # Padding has no gradient.
        grad = tl.where(inside, grad * weight, 0.0)
        tl.store(here, grad.to(kind), mask=columns < width * STEP)
