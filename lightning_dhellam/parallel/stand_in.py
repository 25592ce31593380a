"""A process group of ranks that do not exist: its collectives bring nothing, and copy nothing.

Torch's own stand-in for tests copies what a rank would have sent itself, which of its collectives
and how much differing by version, so that times would count copies that no cluster makes. Here a
collective costs what the link of its lane says, and nothing without one. What Megatron-core starts
itself, such as the reduction of gradients, is played as well.
"""

# Torch's own signatures of these methods differ by version; all are called with these arguments.
# mypy: disable-error-code="override, assignment"

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

BACKEND = "emulated"


class Played(Protocol):
    """What takes the time of a collective."""

    def carry(self, crossing: int) -> dist.Work:
        """Occupy the stream that is current, for as long as so many bytes take."""


class Done(dist.Work):
    """Work that there was nothing to do for."""

    def wait(self, *_: Any) -> bool:
        """Return at once."""
        return True

    def is_completed(self) -> bool:
        """Say that it is, as there was nothing to do."""
        return True


class EmulatedGroup(dist.ProcessGroup):
    """A rank of a group without other processes.

    Attributes:
        link: over which its collectives go; None where they take no time.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._rank, self._size = rank, size
        self.link: Played | None = None

    def rank(self) -> int:
        """Number of this process in the group."""
        return self._rank

    def size(self) -> int:
        """Ranks, which are one process."""
        return self._size

    def getBackendName(self) -> str:
        """What torch calls it."""
        return BACKEND

    def allreduce(self, tensors: Sequence[Tensor], *_: Any, **__: Any) -> dist.Work:
        """Each rank sends all but its own part of the sum's terms, and of the sum."""
        return self._carry(2 * _bytes(tensors) * (self._size - 1) // self._size)

    def broadcast(self, tensors: Sequence[Tensor], *_: Any, **__: Any) -> dist.Work:
        """The tensors cross once."""
        return self._carry(_bytes(tensors))

    def all_gather_single(self, out: Tensor, x: Tensor, *_: Any, **__: Any) -> dist.Work:
        """What is not this rank's own arrives."""
        return self._carry(out.nbytes - x.nbytes)

    def all_gather_single_coalesced(
        self, outs: Sequence[Tensor], xs: Sequence[Tensor], *_: Any, **__: Any
    ) -> dist.Work:
        """Several gathers as one."""
        return self._carry(_bytes(outs) - _bytes(xs))

    def allgather(
        self, outs: Sequence[Sequence[Tensor]], xs: Sequence[Tensor], *_: Any, **__: Any
    ) -> dist.Work:
        """A gather into a list."""
        return self._carry(sum(map(_bytes, outs)) - _bytes(xs))

    def reduce_scatter_single(self, out: Tensor, x: Tensor, *_: Any, **__: Any) -> dist.Work:
        """What others keep leaves."""
        return self._carry(x.nbytes - out.nbytes)

    def reduce_scatter_single_coalesced(
        self, outs: Sequence[Tensor], xs: Sequence[Tensor], *_: Any, **__: Any
    ) -> dist.Work:
        """Several scatters as one."""
        return self._carry(_bytes(xs) - _bytes(outs))

    def reduce_scatter(
        self, outs: Sequence[Tensor], xs: Sequence[Sequence[Tensor]], *_: Any, **__: Any
    ) -> dist.Work:
        """A scatter of a list."""
        return self._carry(sum(map(_bytes, xs)) - _bytes(outs))

    def all_to_all_single(
        self,
        out: Tensor,
        x: Tensor,
        taken: Sequence[int],
        given: Sequence[int],
        *_: Any,
        **__: Any,
    ) -> dist.Work:
        """What this rank does not keep of its own crosses, the larger direction taking longer."""
        equal, own = [len(x) // self._size] * self._size, self._rank
        leaves, arrives = crossing(x, given or equal, own), crossing(out, taken or equal, own)
        return self._carry(max(leaves, arrives))

    def alltoall(
        self, outs: Sequence[Tensor], xs: Sequence[Tensor], *_: Any, **__: Any
    ) -> dist.Work:
        """Exchange lists of tensors, one for each rank."""
        own = self._rank
        return self._carry(max(_bytes(xs) - xs[own].nbytes, _bytes(outs) - outs[own].nbytes))

    def send(self, tensors: Sequence[Tensor], *_: Any, **__: Any) -> dist.Work:
        """The tensors leave."""
        return self._carry(_bytes(tensors))

    def recv(self, tensors: Sequence[Tensor], *_: Any, **__: Any) -> dist.Work:
        """The tensors arrive."""
        return self._carry(_bytes(tensors))

    def barrier(self, *_: Any, **__: Any) -> dist.Work:
        """There is nobody to wait for."""
        return Done()

    # What torch before 2.13 calls them.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single
    allreduce_coalesced = allreduce

    def _carry(self, crossing: int) -> dist.Work:
        if self.link is None or self._size == 1:
            return Done()
        return self.link.carry(crossing)


def join(rank: int, world_size: int) -> None:
    """Initialise torch.distributed as a rank of a world without other processes.

    Raises:
        ValueError: it is initialised already.
    """
    if dist.is_initialized():
        raise ValueError(
            "emulate=... makes another world of this process than the one it is in, of an earlier"
            " run: call torch.distributed.destroy_process_group() before, or use another process"
        )
    if BACKEND.upper() not in dist.Backend._plugins:
        dist.Backend.register_backend(BACKEND, _make, devices=["cpu", "cuda"])
    dist.init_process_group(BACKEND, store=dist.HashStore(), rank=rank, world_size=world_size)


def _make(store: dist.Store, rank: int, size: int, timeout: timedelta) -> EmulatedGroup:
    return EmulatedGroup(rank, size)


def is_emulated() -> bool:
    """Whether this process has joined a cluster of which there is no other process."""
    return dist.is_available() and dist.is_initialized() and dist.get_backend() == BACKEND


def crossing(x: Tensor, rows: Sequence[int], own: int) -> int:
    """Bytes of `x` that are not of the rank `own`.

    The `rows` for each rank lie together in `x`.
    """
    if not x.numel():
        return 0
    return x.nbytes - rows[own] * (x.nbytes // x.shape[0])


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(x.nbytes for x in tensors)
