"""Plain torch: the ground truth, and the CPU path. The host waits for nothing.

Shapes: N tokens, k choices of each, M rows in order of their groups, H channels. `order` [M] is the
token of each row, and `place` [N, k] the row of each choice; -1 is nowhere in both.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Sorted(NamedTuple):
    """Choices in order of their groups, and in each group in order of tokens.

    Attributes:
        order: int32 [N * k], the token of each row; those that chose no group come last, as -1.
        place: int32 [N, k], the row of each choice; -1 where it is no group.
        ends: int32 [groups], how many rows there are up to the end of each group.
    """

    order: Tensor
    place: Tensor
    ends: Tensor


def sort(chosen: Tensor, groups: int) -> Sorted:
    """Order the choices `chosen` [N, k] of tokens; what is not 0 to `groups` - 1 is no group."""
    flat, choices = chosen.flatten(), chosen.shape[1]
    none = (flat < 0) | (flat >= groups)
    values, origin = flat.masked_fill(none, groups).to(torch.int32).sort(stable=True)
    rows = torch.arange(len(flat), dtype=torch.int32, device=flat.device)
    place = torch.empty_like(rows).scatter_(0, origin, rows).masked_fill_(none, -1)
    order = torch.div(origin, choices, rounding_mode="floor").masked_fill_(values == groups, -1)
    each = torch.arange(groups, dtype=torch.int32, device=flat.device)
    ends = torch.searchsorted(values, each, right=True, out_int32=True)
    return Sorted(order.to(torch.int32), place.view(chosen.shape), ends)


def permute(x: Tensor, order: Tensor, place: Tensor | None = None) -> Tensor:
    """Rows `order` [M] of `x` [N, H]; a row that is nowhere is zero. Returns [M, H].

    `place` [N, k] says the same of each token, for versions that then read each row once only.
    """
    if not len(x):
        return x.new_zeros(len(order), x.shape[1])
    return x.index_select(0, order.clamp_min(0)).masked_fill_((order < 0)[:, None], 0)


def unpermute(rows: Tensor, place: Tensor, weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Sum of the rows `place` [N, k] of `rows` [M, H], times their `weights` [N, k] if given.

    The sum is in fp32 and in the order of the choices. Returns [N, H] in `dtype`.
    """
    total = rows.new_zeros((len(place), rows.shape[1]), dtype=torch.float32)
    for choice, where in enumerate(place.unbind(1)):
        part = permute(rows, where).float()
        total += part if weights is None else part * weights[:, choice, None].float()
    return total.to(dtype)


def unpermute_backward(
    dy: Tensor, rows: Tensor, order: Tensor, place: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `unpermute` by `rows` [M, H], in their type, and by `weights` [N, k] in fp32.

    From `dy` [N, H], that of the sum. The gradient of a row that is no token's is zero.
    """
    wide = dy.float()
    found = [(wide * permute(rows, where).float()).sum(1) for where in place.unbind(1)]
    # Weights of choices that are nowhere go behind the rows.
    behind = torch.where(place < 0, len(rows), place).flatten().long()
    scale = weights.new_zeros(len(rows) + 1, dtype=torch.float32)
    scale.scatter_(0, behind, weights.flatten().float())
    d_rows = permute(wide, order) * scale[:-1, None]
    return d_rows.to(rows.dtype), torch.stack(found, dim=1)
