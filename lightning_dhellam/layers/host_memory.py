"""Host memory in which saved slots wait for backward: buffers that later ones take again.

On CUDA they are pinned. Copies both ways are issued on one stream, in whose order a buffer is read
before it is written again, so that the host waits for nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor

Form = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Sizes, strides and type of what is in a buffer."""


class HostMemory:
    """The buffers of a rank.

    Args:
        device: that slots are on.

    Attributes:
        bytes: of all buffers, which are as many as were in use at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.bytes = 0
        self._device = device
        self._free: dict[Form, list[Tensor]] = defaultdict(list)

    def away(self, value: Any) -> OnHost:
        """Copy the tensors of a slot's value, and return what stands for it."""
        taken: list[tuple[Form, Tensor]] = []

        def copy(tensor: Tensor) -> Tensor:
            if tensor.requires_grad or not tensor.dim():
                return tensor  # part of a graph of autograd, or too small to be worth a copy
            form = tensor.shape, tensor.stride(), tensor.dtype
            buffer = self._free[form].pop() if self._free[form] else self._buffer(tensor)
            buffer.copy_(tensor, non_blocking=True)
            taken.append((form, buffer))
            return buffer

        return OnHost(_each(value, copy), taken, self._free)

    def back(self, held: OnHost) -> Any:
        """Return the value again, in memory of the device."""
        buffers = {id(buffer) for _, buffer in held.taken}

        def copy(tensor: Tensor) -> Tensor:
            if id(tensor) not in buffers:
                return tensor
            made = torch.empty_like(tensor, device=self._device, pin_memory=False)
            return made.copy_(tensor, non_blocking=True)

        return _each(held.value, copy)

    def _buffer(self, like: Tensor) -> Tensor:
        pinned = self._device.type == "cuda"
        self.bytes += bytes_of((like.shape, like.stride(), like.dtype))
        return torch.empty_like(like, device="cpu", pin_memory=pinned)


class OnHost:
    """What stands for a slot's value while it is on the host. Its buffers go back when it goes.

    Attributes:
        value: with buffers in place of tensors.
        taken: the buffers.
    """

    def __init__(
        self,
        value: Any,
        taken: list[tuple[Form, Tensor]],
        free: dict[Form, list[Tensor]],
    ) -> None:
        self.value, self.taken, self._free = value, taken, free

    @property
    def form(self) -> tuple[Form, ...]:
        """What says how large the value is."""
        return tuple(form for form, _ in self.taken)

    def __del__(self) -> None:
        for form, buffer in self.taken:
            self._free[form].append(buffer)


def bytes_of(form: Form) -> int:
    """Bytes of a buffer."""
    shape, _, dtype = form
    return prod(shape) * dtype.itemsize


def _each(value: Any, copy: Callable[[Tensor], Tensor]) -> Any:
    """The same value with other tensors, also of tuples."""
    if isinstance(value, Tensor):
        return copy(value)
    if isinstance(value, tuple):
        parts = [_each(part, copy) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
