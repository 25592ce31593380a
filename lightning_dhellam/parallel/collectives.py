"""Asynchronous collectives of one communication lane.

Each starts its work and returns at once. On CUDA NCCL's kernel is on the stream that is current,
the lane's, with its priority, and there is nothing to wait for. On CPU the holder of the `Pending`
waits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import torch.distributed as dist
from torch import Tensor

from lightning_dhellam.parallel.work import Once, Work
from lightning_dhellam.versions import all_gather_single, reduce_scatter_single

Found = TypeVar("Found")


class Transport(Protocol):
    """What carries collectives in place of their group's own."""

    def all_gather(self, x: Tensor, out: Tensor) -> Work | None:
        """Start to fill `out` with `x` of every rank.

        Returns what to wait for on the host, None on CUDA.
        """

    def reduce_scatter(self, x: Tensor, out: Tensor) -> Work | None:
        """Start to sum this rank's part of `x` over all ranks into `out`.

        Returns what to wait for on the host, None on CUDA.
        """


class Pending(NamedTuple):
    """A result that is still being computed.

    Attributes:
        value: what the operator writes. Not readable before `work` is waited for.
        work: what to wait for on the host (CPU), or None when the lane's stream orders it (CUDA).
    """

    value: Any
    work: Work | None


def all_gather(x: Tensor, group: dist.ProcessGroup, transport: Transport | None = None) -> Pending:
    """Concatenate `x` [n, ...] of all ranks along dimension 0: [ranks * n, ...].

    Over an emulated link nothing arrives, but the lane is busy for as long as it would take.
    """
    x = x.contiguous()
    out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    if transport is not None:
        return Pending(out, transport.all_gather(x, out))
    return Pending(out, all_gather_single(out, x, group=group, async_op=not x.is_cuda))


def reduce_scatter(
    x: Tensor, group: dist.ProcessGroup, transport: Transport | None = None
) -> Pending:
    """Sum `x` [ranks * n, ...] over all ranks and keep this rank's part [n, ...].

    Over an emulated link nothing is summed, but the lane is busy for as long as it would take.
    """
    x = x.contiguous()
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    if transport is not None:
        return Pending(out, transport.reduce_scatter(x, out))
    return Pending(out, reduce_scatter_single(out, x, group=group, async_op=not x.is_cuda))


def send(x: Tensor, peer: int, group: dist.ProcessGroup) -> Pending:
    """Send `x` to the rank `peer` of `group`. Writes nothing; `x` is read until the work is done.

    Sends of one group to one peer arrive in order, so a group must not carry both directions.
    """
    return _transfer(None, dist.isend(x.contiguous(), group=group, group_dst=peer), x.is_cuda)


def receive(out: Tensor, peer: int, group: dist.ProcessGroup) -> Pending:
    """Receive `out`, of the shape and type that the rank `peer` of `group` sends next."""
    return _transfer(out, dist.irecv(out, group=group, group_src=peer), out.is_cuda)


def _transfer(value: Tensor | None, work: dist.Work | None, on_cuda: bool) -> Pending:
    assert work is not None, "a transfer of a group that this rank is not in"
    if on_cuda:
        work.wait()  # only makes the track's stream wait
        return Pending(value, None)
    return Pending(value, Once([work]))


def from_first(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`value` of the first rank of `group`, on all of them; on the others it only has the shape."""
    if group is not None and group.size() > 1:
        dist.broadcast(value, group=group, group_src=0)
    return value


def largest(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The largest of all ranks' values, element by element; on the device that the group needs."""
    if group is None or group.size() == 1:
        return values
    if dist.get_backend(group) == "nccl":
        values = values.cuda()
    dist.all_reduce(values, op=dist.ReduceOp.MAX, group=group)
    return values


def reduced(value: Tensor, group: dist.ProcessGroup | None, operation: Any = "mean") -> Tensor:
    """The `mean`, `sum`, `min` or `max` (or a `ReduceOp`) over all ranks, of the type of `value`.

    Nothing waits for it on the host.
    """
    if group is None or group.size() == 1:
        return value
    mean = operation in ("mean", "avg")
    result = value.clone()
    name = "SUM" if mean else operation
    dist.all_reduce(
        result, getattr(dist.ReduceOp, name.upper()) if isinstance(name, str) else name, group
    )
    return (result / group.size()).to(value.dtype) if mean else result


def same_on_all_ranks(value: str, group: dist.ProcessGroup | None, *, stage: int = 0) -> list[str]:
    """Every rank's `value`, when they differ; an empty list when all ranks hold the same.

    Ranks of different `stage` may hold different values.
    """
    values = of_all_ranks((stage, value), group)
    stages = {stage for stage, _ in values}
    return [] if len(set(values)) == len(stages) else [text for _, text in values]


def of_all_ranks(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's `value`, which is any that can be pickled."""
    if group is None or group.size() == 1:
        return [value]
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


class Failure(NamedTuple):
    """What went wrong on a rank, and whether it is a mistake of the user."""

    text: str
    mistake: bool


def try_together(
    part: Callable[[], None], group: dist.ProcessGroup | None
) -> tuple[Exception | None, list[Failure]]:
    """Do `part` on every rank, and wait for all of them: what went wrong here, and on any rank.

    A rank that raised at once would leave the others waiting for it.
    """
    mine: Exception | None = None
    failure: Failure | None = None
    try:
        part()
    except Exception as error:
        rank = 0 if group is None else group.rank()
        mine = error
        text = f"rank {rank}: {type(error).__name__}: {error}"
        failure = Failure(text, isinstance(error, ValueError))
    return mine, [found for found in of_all_ranks(failure, group) if found is not None]


def together(part: Callable[[], Found], group: dist.ProcessGroup | None) -> Found:
    """The value of `part` on every rank; what fails on one is raised on all of them.

    Raises:
        ValueError: on the ranks where nothing failed, with the text of a ValueError of another.
        RuntimeError: the same, of any other error.
    """
    found: list[Found] = []
    mine, failures = try_together(lambda: found.append(part()), group)
    if mine is not None:
        raise mine
    if failures:
        kind = ValueError if failures[0].mistake else RuntimeError
        raise kind(failures[0].text)
    return found[0]
