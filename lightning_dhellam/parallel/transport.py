"""What carries the collectives of a lane: torch.distributed's own group, or something else.

    Alone                  one rank: everything is here already
    GroupTransport         the group's own: NCCL, or gloo where `Duplex` is not used
    Duplex                 gloo with connections of its own (`duplex.py`)
    SharedMemoryTransport  exchanges through memory that GPUs of one host share (`copy_engine.py`)
    EmulatedLink           takes the time and brings nothing (`link.py`)

None of them is seen by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_dhellam.parallel import nccl
from lightning_dhellam.parallel.work import Once, Work
from lightning_dhellam.plan import Collective, Lane
from lightning_dhellam.versions import all_gather_single, reduce_scatter_single


class Transport(Protocol):
    """What carries the collectives of one lane.

    Each method starts to carry, and returns what to wait for on the host: None on CUDA, where the
    stream that is current orders it. Tensors are contiguous, and are cut along dimension 0. What is
    sent must stay as it is, and what is received must not be read, until the work is done.
    """

    def all_gather(self, x: Tensor, out: Tensor) -> Work | None:
        """Start to fill `out` [ranks * n, ...] with `x` [n, ...] of every rank."""

    def reduce_scatter(self, x: Tensor, out: Tensor) -> Work | None:
        """Start to sum this rank's part of `x` [ranks * n, ...] over all ranks into `out`."""

    def exchange(
        self, sent: Sequence[Tensor], received: Sequence[Tensor], target: int, source: int
    ) -> Work | None:
        """Start to send tensors to the rank `target` and to fill others from the rank `source`.

        What a rank receives is of the sizes that `source` sends. No part takes a message if empty.
        """

    def all_to_all(
        self,
        sent: Sequence[Tensor],
        received: Sequence[Tensor],
        given: Sequence[int],
        taken: Sequence[int],
    ) -> Work | None:
        """Start to send every rank r its `given[r]` rows, and to fill `taken[r]` rows from it.

        The rows for a rank lie together, in the order of ranks, in each of the tensors `sent` and
        `received`.
        """

    def processors(self, collective: Collective) -> int:
        """Multiprocessors that such a collective occupies; 0 where none are, or none can tell."""


class Alone:
    """One rank: what it receives is what it sends."""

    def all_gather(self, x: Tensor, out: Tensor) -> None:
        """See `Transport`."""
        out.copy_(x)

    def reduce_scatter(self, x: Tensor, out: Tensor) -> None:
        """See `Transport`."""
        out.copy_(x)

    def exchange(
        self, sent: Sequence[Tensor], received: Sequence[Tensor], target: int, source: int
    ) -> None:
        """See `Transport`."""
        assert target == source == 0, "there is one rank"
        for x, out in zip(sent, received, strict=True):
            out.copy_(x)

    def all_to_all(
        self,
        sent: Sequence[Tensor],
        received: Sequence[Tensor],
        given: Sequence[int],
        taken: Sequence[int],
    ) -> None:
        """See `Transport`."""
        self.exchange(sent, received, 0, 0)

    def processors(self, collective: Collective) -> int:
        """See `Transport`."""
        return 0


class GroupTransport:
    """Carries collectives by the process group of the lane itself.

    Args:
        group: of NCCL or gloo.
        lane: whose settings the group has.
        one_way: whether its exchanges only send, or only receive, as along the edges of a pipeline.
            Other ranks of the group take no part in them.
    """

    def __init__(self, group: ProcessGroup, lane: Lane, *, one_way: bool = False) -> None:
        self._group = group
        self._lane = lane
        self._one_way = one_way
        self._by_nccl = dist.get_backend(group) == "nccl"

    def all_gather(self, x: Tensor, out: Tensor) -> Work | None:
        """See `Transport`."""
        work: Work | None = all_gather_single(out, x, group=self._group, async_op=not x.is_cuda)
        return work

    def reduce_scatter(self, x: Tensor, out: Tensor) -> Work | None:
        """See `Transport`."""
        work: Work | None = reduce_scatter_single(out, x, group=self._group, async_op=not x.is_cuda)
        return work

    def exchange(
        self, sent: Sequence[Tensor], received: Sequence[Tensor], target: int, source: int
    ) -> Work | None:
        """See `Transport`."""
        given = [x for x in sent if x.numel()]
        taken = [out for out in received if out.numel()]
        if not (given or taken):
            return None
        if self._one_way:
            works = self._apart(given, taken, target, source)
        else:
            works = self._together(given, taken, target, source)
        if not (sent or received)[0].is_cuda:
            return Once(works)
        for work in works:
            work.wait()  # only makes the lane's stream wait
        return None

    def _together(
        self, sent: Sequence[Tensor], received: Sequence[Tensor], target: int, source: int
    ) -> list[dist.Work]:
        """Transfers as one, or two ranks that send first would wait for each other."""
        group = self._group
        transfers = [dist.P2POp(dist.isend, x, group=group, group_peer=target) for x in sent]
        transfers += [dist.P2POp(dist.irecv, x, group=group, group_peer=source) for x in received]
        works: list[dist.Work] = dist.batch_isend_irecv(transfers)
        return works

    def _apart(
        self, sent: Sequence[Tensor], received: Sequence[Tensor], target: int, source: int
    ) -> list[dist.Work]:
        """Transfers one by one, since all ranks of a group must take part in its first as one."""
        assert not (sent and received), "an edge goes one way"
        works = [dist.isend(x, group=self._group, group_dst=target) for x in sent]
        works += [dist.irecv(x, group=self._group, group_src=source) for x in received]
        assert None not in works, "a transfer of a group that this rank is not in"
        return cast(list[dist.Work], works)

    def all_to_all(
        self,
        sent: Sequence[Tensor],
        received: Sequence[Tensor],
        given: Sequence[int],
        taken: Sequence[int],
    ) -> Work | None:
        """See `Transport`."""
        works = [
            dist.all_to_all_single(
                as_bytes(out),
                as_bytes(x),
                list(taken),
                list(given),
                group=self._group,
                async_op=not x.is_cuda,
            )
            for x, out in zip(sent, received, strict=True)
        ]
        return Once([work for work in works if work is not None]) if any(works) else None

    def processors(self, collective: Collective) -> int:
        """See `Transport`."""
        return nccl.processors(self._lane, collective) if self._by_nccl else 0


def as_bytes(x: Tensor) -> Tensor:
    """The same memory as bytes [n, ...], which every backend carries whatever `x` [n, ...] is."""
    rows = x.flatten(1) if x.dim() > 1 else x[:, None]
    return rows.view(torch.uint8)
