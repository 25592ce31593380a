"""Host memory in which saved slots wait for backward: buffers that later ones take again.

On CUDA they are pinned. A slot on the host is let go of when the lane that has copied it there has
waited for the copy back (`engine.tracks`), so that its buffer is read before it is written again,
and the host waits for nothing.

A buffer has a power of two of bytes, as torch's own allocator of pinned memory rounds up to, and at
least a page. It serves what fits into no smaller one: how many tokens an expert gets, or a padded
micro-batch has, is new in each step, and a buffer for each size would be pinned in mid-step, and
kept. So there are as many of a size as were in use at once, and all together take less than four
times what they would hold if all that was in use at once were as large as the largest, pages aside.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

_PAGE = 4096

Form = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Sizes, strides and type of a tensor in a buffer."""


class HostMemory:
    """The buffers of a rank.

    Args:
        device: that slots are on.

    Attributes:
        bytes: of all buffers, which are as many of each size as were in use at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0
        self._device = device
        self._free: dict[int, list[Tensor]] = defaultdict(list)

    def away(self, value: Any) -> OnHost:
        """Copy the tensors of a slot's value, and return what stands for it."""
        taken: list[tuple[Tensor, Tensor]] = []

        def copy(tensor: Tensor) -> Tensor:
            if tensor.requires_grad or not tensor.dim():
                return tensor  # part of a graph of autograd, or too small to be worth a copy
            buffer = self._buffer(room(tensor.shape, tensor.dtype))
            # What has gaps, such as a part of each row, lies without them.
            strides = torch.empty_like(tensor, device="meta").stride()
            flat = buffer[: tensor.numel() * tensor.itemsize].view(tensor.dtype)
            held = flat.as_strided(tensor.shape, strides)
            held.copy_(tensor, non_blocking=True)
            taken.append((held, buffer))
            return held

        return OnHost(_each(value, copy), taken, self._free)

    def back(self, held: OnHost) -> Any:
        """Return the value again, in memory of the device."""
        copies = {id(tensor) for tensor, _ in held.taken}

        def copy(tensor: Tensor) -> Tensor:
            if id(tensor) not in copies:
                return tensor
            made = torch.empty_like(tensor, device=self._device, pin_memory=False)
            return made.copy_(tensor, non_blocking=True)

        return _each(held.value, copy)

    def _buffer(self, size: int) -> Tensor:
        if self._free[size]:
            return self._free[size].pop()
        self.bytes += size
        pinned = self._device.type == "cuda"
        return torch.empty(size, dtype=torch.uint8, pin_memory=pinned)


class OnHost:
    """What stands for a slot's value while it is on the host. Its buffers go back when it goes.

    Attributes:
        value: with copies in buffers in place of tensors.
        taken: the copies, and the buffer of each.
    """

    def __init__(
        self,
        value: Any,
        taken: list[tuple[Tensor, Tensor]],
        free: dict[int, list[Tensor]],
    ) -> None:
        self.value, self.taken, self._free = value, taken, free

    @property
    def form(self) -> tuple[Form, ...]:
        """What says how large the value is."""
        return tuple((t.shape, t.stride(), t.dtype) for t, _ in self.taken)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each buffer."""
        return tuple(buffer.numel() for _, buffer in self.taken)

    def __del__(self) -> None:
        for _, buffer in self.taken:
            self._free[buffer.numel()].append(buffer)


def room(shape: torch.Size, dtype: torch.dtype) -> int:
    """Bytes of the buffer in which such a tensor is held."""
    return 1 << (max(prod(shape) * dtype.itemsize, _PAGE) - 1).bit_length()


def _each(value: Any, copy: Callable[[Tensor], Tensor]) -> Any:
    """The same value with other tensors, also of tuples."""
    if isinstance(value, Tensor):
        return copy(value)
    if isinstance(value, tuple):
        parts = [_each(part, copy) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
