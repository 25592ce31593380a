"""Copies of tensors in host memory, from which a checkpoint is written while training goes on.

On CUDA the copies are made beside the next step's computation: what the optimizer holds changes at
the end of that step only, so its stream waits there. All else may change at once, as by a callback.
It is copied on the device first, where that has room, and from there beside the computation:

    compute   copies on the device | next step ...............................| wait | update
    copies                         | weights -> host | optimizer's state -> host |

The host waits for none of it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from math import prod

import numpy
import torch
from torch import Tensor

_ALIGNMENT = 16


class Staging:
    """Host memory of the size of what a rank writes, which each save takes again.

    On CUDA it is pinned: as it is, since torch's allocator of pinned memory rounds up to a power of
    two.

    Args:
        device: that the tensors are on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = numpy.empty(0, numpy.uint8)
        self._pinned = 0
        self._copied: torch.cuda.Event | None = None
        self._stream: torch.cuda.Stream | None = None

    @property
    def size(self) -> int:
        """Bytes that are held."""
        return self._memory.nbytes

    def copy(self, tensors: Mapping[str, Tensor], changed_late: set[str]) -> dict[str, Tensor]:
        """Copies of some tensors, which are right once `wait` is over.

        Args:
            tensors: by name.
            changed_late: names of those that nobody changes before `hold`; the others may change
                at once.
        """
        ends, end = {}, 0
        for name, tensor in tensors.items():
            start = -(-end // _ALIGNMENT) * _ALIGNMENT
            end = start + tensor.numel() * tensor.element_size()
            ends[name] = start, end
        self._take(end)
        copies = {name: self._view(t, *ends[name]) for name, t in tensors.items()}
        at_once = {n: t for n, t in tensors.items() if t.device.type != "cuda"}
        late = {n: t for n, t in tensors.items() if n in changed_late and n not in at_once}
        early = {n: t.detach() for n, t in tensors.items() if n not in late and n not in at_once}
        kept = self._kept(early) if early else {}
        late, early = kept | late, {} if kept else early
        for name, tensor in (at_once | early).items():
            copies[name].copy_(tensor.detach(), non_blocking=tensor.is_cuda)
        if self._device.type == "cuda":
            self._copy_beside(late, copies)
        return copies

    def _kept(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the device, if they fit into half of the memory that nobody has taken so far.

        What torch has taken is what the next step needs.
        """
        free, _ = torch.cuda.mem_get_info(self._device)
        if 2 * sum(tensor.nbytes for tensor in tensors.values()) > free:
            return {}
        try:
            return {name: tensor.clone() for name, tensor in tensors.items()}
        except torch.OutOfMemoryError:  # the process may take a part of the memory only
            return {}

    def _copy_beside(self, tensors: Mapping[str, Tensor], copies: Mapping[str, Tensor]) -> None:
        self._stream = self._stream or torch.cuda.Stream(self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for name, tensor in tensors.items():
                copies[name].copy_(tensor.detach(), non_blocking=True)
                tensor.record_stream(self._stream)  # it may be given back before it is copied
            self._copied = torch.cuda.Event()
            self._copied.record()

    def hold(self) -> None:
        """Let the device change nothing that is still being copied. The host does not wait."""
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)

    def wait(self) -> None:
        """Wait until the copies are there. From any thread."""
        if self._copied is not None:
            self._copied.synchronize()

    def close(self) -> None:
        """Give the memory back. Nobody may read copies any more."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._pinned)
        self._memory, self._pinned, self._copied = numpy.empty(0, numpy.uint8), 0, None

    def _take(self, size: int) -> None:
        if size == self._memory.nbytes:
            return
        self.close()
        self._memory = numpy.empty(size, numpy.uint8)
        if self._device.type == "cuda" and size:
            place = self._memory.ctypes.data
            if int(torch.cuda.cudart().cudaHostRegister(place, size, 0)) == 0:
                self._pinned = place
            else:
                warnings.warn(
                    f"{size} bytes of host memory for checkpoints could not be pinned, so copies"
                    " take longer: raise the limit of locked memory (ulimit -l)",
                    stacklevel=2,
                )

    def _view(self, tensor: Tensor, start: int, end: int) -> Tensor:
        """A tensor with a storage of its own size, of which nobody makes another copy to write."""
        if start == end:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        part = torch.frombuffer(self._memory[start:end], dtype=tensor.dtype)
        assert part.untyped_storage().nbytes() == end - start and part.numel() == prod(tensor.shape)
        return part.view(tensor.shape)
