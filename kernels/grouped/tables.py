"""Where the tensors of a group lie, as the device reads it: one descriptor for all of them.

The weights of experts are parameters of their own, and so are their gradients. The tensor memory
accelerator of a GPU reads and writes blocks of one array of up to five axes. As an array may begin
anywhere and its axes may overlap, tensors of one shape are one array of three: an axis that moves
from tensor to tensor, rows, columns. So a kernel finds tensor g at place `table[g]` of the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_ALIGNED = 16
"""Bytes that addresses and rows are multiples of."""

_PLACES = 0x7FFF_0000
"""How far an axis goes that moves from tensor to tensor: coordinates have 32 bits."""


class Places(NamedTuple):
    """Tensors of one shape.

    Attributes:
        first: the one with the lowest address.
        pitch: elements from place to place.
        table: int32 [2, L]: place of each tensor, counted from `first`, and whether it is fresh.
    """

    first: Tensor
    pitch: int
    table: Tensor

    def array(self, block: tuple[int, int]) -> TensorDescriptor:
        """All of them [places, rows, columns], as blocks of one are read."""
        rows, columns = self.first.shape
        return TensorDescriptor(
            self.first, [_PLACES, rows, columns], [self.pitch, columns, 1], [1, *block]
        )


def fits(*tensors: Tensor) -> bool:
    """Whether each lies as descriptors can say: rows side by side, of whole 16 bytes."""
    return all(
        t.is_contiguous()
        and t.data_ptr() % _ALIGNED == 0
        and t.shape[-1] * t.itemsize % _ALIGNED == 0
        for t in tensors
    )


def places_of(tensors: Sequence[Tensor], fresh: Sequence[bool] | None = None) -> Places:
    """Where `tensors` lie, all of one shape and type.

    The table is made once for each set of addresses; only then the host waits for the device.
    """
    addresses = tuple(t.data_ptr() for t in tensors)
    marks = (False,) * len(tensors) if fresh is None else tuple(map(bool, fresh))
    step, table = _table(tensors[0].device, addresses, marks)
    first = min(tensors, key=Tensor.data_ptr).detach()
    return Places(first, step // first.itemsize, table)


@lru_cache(maxsize=8192)
def _table(
    device: torch.device, addresses: tuple[int, ...], fresh: tuple[bool, ...]
) -> tuple[int, Tensor]:
    """Bytes from place to place, and the table."""
    distances = [address - min(addresses) for address in addresses]
    step = math.gcd(*distances) or _ALIGNED
    places = [distance // step for distance in distances]
    assert max(places) < _PLACES, f"tensors of a group lie {max(distances)} bytes apart"
    return step, torch.tensor([places, fresh], dtype=torch.int32, device=device)
