"""Routings that a stage rehearses by, since those of its steps are not known before.

Which kernels are launched may depend on how many rows experts have: none, one, few, many. So a step
is rehearsed by several routings, made up so that each of these occurs on every rank, and none needs
more memory than even use of the experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

COUNT = 3
"""How many routings there are."""


def made_up(chosen: Tensor, experts: int, number: int) -> Tensor:
    """Choices [N, k] that are made up, in place of those of tokens in `chosen`.

    Args:
        chosen: experts that tokens have chosen, of which shape and type are taken.
        experts: E, how many there are; a choice that is dropped is E.
        number: 0 for even use, 1 for experts of which each has half as many rows as the one before
            it, down to one and from the start again, 2 for no rows at all.
    """
    tokens, each = chosen.shape
    places = torch.arange(tokens * each, device=chosen.device).view(tokens, each)
    even = (places % experts).to(chosen.dtype)
    if number == 0:
        return even
    if number == 2:
        return torch.full_like(chosen, experts)
    most = max(1, tokens * each // experts)
    # Counted from 0, the place of a choice among those of its expert.
    limits = torch.tensor(
        [max(1, most >> (expert % most.bit_length())) for expert in range(experts)],
        device=chosen.device,
    )
    return even.masked_fill(places // experts >= limits[places % experts], experts)
