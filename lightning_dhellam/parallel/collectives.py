"""Asynchronous collectives of one communication lane.

Each starts its work and returns at once. On CUDA NCCL's kernel is on the stream that is current,
the lane's, with its priority, and there is nothing to wait for. On CPU the holder of the `Pending`
waits.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dhellam.parallel.link import EmulatedLink

Found = TypeVar("Found")

# Torch 2.13 renamed both; 2.11 has only the old names.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Work(Protocol):
    """Something that runs until it is waited for."""

    def wait(self) -> Any:
        """Return when it is done."""

    def is_completed(self) -> bool:
        """Whether it is known to be done."""


class Pending(NamedTuple):
    """A result that is still being computed.

    Attributes:
        value: what the operator writes. Not readable before `work` is waited for.
        work: what to wait for on the host (CPU), or None when the lane's stream orders it (CUDA).
    """

    value: Any
    work: Work | None


def all_gather(x: Tensor, group: dist.ProcessGroup, link: EmulatedLink | None = None) -> Pending:
    """Concatenate `x` [n, ...] of all ranks along dimension 0: [ranks * n, ...].

    With an emulated `link` nothing arrives, but the lane is busy for as long as it would take.
    """
    x = x.contiguous()
    out = x.new_empty(x.shape[0] * group.size(), *x.shape[1:])
    if link is not None:
        return Pending(out, link.carry(x, out, crossing=out.nbytes - x.nbytes))
    return Pending(out, _all_gather(out, x, group=group, async_op=not x.is_cuda))


def reduce_scatter(
    x: Tensor, group: dist.ProcessGroup, link: EmulatedLink | None = None
) -> Pending:
    """Sum `x` [ranks * n, ...] over all ranks and keep this rank's part [n, ...].

    With an emulated `link` nothing is summed, but the lane is busy for as long as it would take.
    """
    x = x.contiguous()
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    if link is not None:
        return Pending(out, link.carry(x, out, crossing=x.nbytes - out.nbytes))
    if x.is_cuda:
        return Pending(out, _reduce_scatter(out, x, group=group, async_op=False))
    # Gloo's own reduce-scatter sends twice as much as this.
    parts = torch.empty_like(x)
    work = dist.all_to_all_single(parts, x, group=group, async_op=True)
    return Pending(out, Summed(work, parts.view(group.size(), *out.shape), out))


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
    return Pending(value, OnceWaited(work))


class Summed:
    """The sum of what has arrived from all ranks, made by the first who waits.

    Args:
        work: that brings the parts.
        parts: [ranks, n, ...], added up in this order, which is the same in every run.
        out: [n, ...], gets the sum.
    """

    def __init__(self, work: dist.Work, parts: Tensor, out: Tensor) -> None:
        self._work = work
        self._parts: Tensor | None = parts
        self._out = out
        self._lock = Lock()

    def wait(self) -> None:
        """Return when the sum is there. Any thread may wait."""
        with self._lock:
            if self._parts is not None:
                self._work.wait()
                with torch.no_grad():
                    torch.sum(self._parts, dim=0, out=self._out)
                self._parts = None

    def is_completed(self) -> bool:
        """Whether the sum is there."""
        return self._parts is None


class OnceWaited:
    """A gloo transfer: it knows that it is done only by being waited for, and never twice."""

    def __init__(self, work: dist.Work) -> None:
        self._work: dist.Work | None = work
        self._lock = Lock()

    def wait(self) -> None:
        """Return when the tensor has left or arrived. Any thread may wait."""
        with self._lock:
            if self._work is not None:
                self._work.wait()
                self._work = None

    def is_completed(self) -> bool:
        """Whether it was waited for."""
        return self._work is None


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
