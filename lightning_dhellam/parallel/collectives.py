"""Asynchronous collectives of one communication lane, of any number of tensors.

Each starts its work and returns at once. On CUDA NCCL's kernel is on the stream that is current,
the lane's, with its priority, and there is nothing to wait for. On CPU the holder of the `Pending`
waits.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dhellam.failures import is_lost
from lightning_dhellam.parallel.communicator import Communicator
from lightning_dhellam.parallel.transport import Transport
from lightning_dhellam.parallel.work import Once, Work
from lightning_dhellam.versions import all_gather_single

Found = TypeVar("Found")
_AT_ONCE = 1024
"""Bytes of a value that ranks tell each other together with its size: most have no more."""
_HEAD = 8
"""Bytes of that size."""


class Pending(NamedTuple):
    """A result that is still being computed.

    Attributes:
        value: what the operator writes: one tensor, or a tuple of several. Not readable before
            `work` is waited for.
        work: what to wait for on the host (CPU), or None when the lane's stream orders it (CUDA).
    """

    value: Any
    work: Work | None


def all_gather(communicator: Communicator, x: Tensor, *more: Tensor) -> Pending:
    """Concatenate each tensor [n, ...] of all ranks along dimension 0: [ranks * n, ...].

    Over an emulated link nothing arrives, but the lane is busy for as long as it would take.
    """
    x = _given(x)
    out = x.new_empty(x.shape[0] * communicator.size, *x.shape[1:])
    pending = Pending(out, communicator.transport.all_gather(x, out))
    return _joined(pending, *(all_gather(communicator, y) for y in more)) if more else pending


def reduce_scatter(communicator: Communicator, x: Tensor, *more: Tensor) -> Pending:
    """Sum each tensor [ranks * n, ...] over all ranks and keep this rank's part [n, ...].

    Over an emulated link nothing is summed, but the lane is busy for as long as it would take.
    """
    x = _given(x)
    out = x.new_empty(x.shape[0] // communicator.size, *x.shape[1:])
    pending = Pending(out, communicator.transport.reduce_scatter(x, out))
    return _joined(pending, *(reduce_scatter(communicator, y) for y in more)) if more else pending


def exchange(
    communicator: Communicator,
    *tensors: Tensor,
    target: int,
    source: int,
    rows: Sequence[int] | None = None,
) -> Pending:
    """Send tensors to the rank `target` of the lane, and receive as many from the rank `source`.

    All ranks must call it, each as the source of its target. As a ring does: `target` is the next
    rank and `source` the one before.

    Args:
        communicator: of the lane.
        tensors: to send, each [n, ...]; none is a scalar.
        target: who receives them.
        source: who sends here what is received.
        rows: sizes of dimension 0 of what is received, if they are not those of `tensors`.
    """
    given = [*map(_given, tensors)]
    sizes = [x.shape[0] for x in given] if rows is None else rows
    outs = [x.new_empty(n, *x.shape[1:]) for x, n in zip(given, sizes, strict=True)]
    work = communicator.transport.exchange(given, outs, target, source)
    return Pending(outs[0] if len(outs) == 1 else tuple(outs), work)


def all_to_all(
    communicator: Communicator, *tensors: Tensor, given: Sequence[int], taken: Sequence[int]
) -> Pending:
    """Send every rank its rows of each tensor, and receive this rank's rows of theirs.

    All tensors are cut alike, and may be of any type. Nothing is known of sizes but what is given
    here: `taken[r]` must be what rank r gives this one.

    Args:
        communicator: of the lane.
        tensors: to send, each [sum(given), ...]: the rows for rank 0 come first.
        given: rows for each rank, which may be none.
        taken: rows from each rank, which may be none; what is received is [sum(taken), ...].

    Raises:
        ValueError: the sizes are not one for each rank, or `given` does not add up to the rows.
    """
    _check_rows(communicator, tensors, given, taken)
    sent = [*map(_given, tensors)]
    outs = [x.new_empty(sum(taken), *x.shape[1:]) for x in sent]
    work = communicator.transport.all_to_all(sent, outs, given, taken)
    return Pending(outs[0] if len(outs) == 1 else tuple(outs), work)


def _given(x: Tensor) -> Tensor:
    """What a transport takes. Autograd must not see it: backward is operators of its own."""
    return (x.detach() if x.requires_grad else x).contiguous()


def _check_rows(
    communicator: Communicator,
    tensors: Sequence[Tensor],
    given: Sequence[int],
    taken: Sequence[int],
) -> None:
    for name, rows in (("given", given), ("taken", taken)):
        if len(rows) != communicator.size or min(rows) < 0:
            raise ValueError(
                f"{name}={list(rows)} must be a number of rows for each of the"
                f" {communicator.size} ranks of the {communicator.lane} lane"
            )
    for x in tensors:
        if x.shape[0] != sum(given):
            raise ValueError(
                f"given={list(given)} are {sum(given)} rows, but a tensor has {x.shape[0]}: all"
                " must be given to some rank"
            )


def _joined(*pendings: Pending) -> Pending:
    """Several results as one, which is there when all are."""
    works = [pending.work for pending in pendings if pending.work is not None]
    return Pending(tuple(pending.value for pending in pendings), Once(works) if works else None)


def send(x: Tensor, target: int, edge: Transport) -> Pending:
    """Send `x` to the stage `target`. Writes nothing; `x` is read until the work is done.

    What is sent on an edge arrives in order.
    """
    return Pending(None, edge.exchange([x.contiguous()], [], target, target))


def receive(out: Tensor, source: int, edge: Transport) -> Pending:
    """Receive `out`, of the shape and type that the stage `source` sends next on an edge."""
    return Pending(out, edge.exchange([], [out], source, source))


def from_one(value: Tensor, group: dist.ProcessGroup | None, source: int = 0) -> Tensor:
    """`value` of one rank of `group`, on all of them; on the others it only has the shape."""
    if group is not None and group.size() > 1:
        dist.broadcast(value, group=group, group_src=source)
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


def of_every_rank(value: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The values of all ranks, of one shape, by rank: [ranks, ...]."""
    found = value.new_empty(group.size(), *value.shape)
    all_gather_single(found, value.contiguous()[None], group=group)
    return found


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
    data = pickle.dumps(value)
    sizes, heads = _exchanged(data, _AT_ONCE, group)
    longest = max(sizes)
    whole = _exchanged(data, longest, group)[1] if longest > _AT_ONCE else heads
    return [pickle.loads(part[:size]) for part, size in zip(whole, sizes, strict=True)]


def _exchanged(
    data: bytes, room: int, group: dist.ProcessGroup
) -> tuple[list[int], list[memoryview]]:
    """How many bytes every rank has, and of each as many as there is `room` for."""
    begun = data[:room]
    message = bytearray(len(data).to_bytes(_HEAD, "little") + begun + bytes(room - len(begun)))
    mine = torch.frombuffer(message, dtype=torch.uint8)
    parts = [memoryview(row) for row in _bytes_of_all(mine, group).numpy()]
    return [int.from_bytes(p[:_HEAD], "little") for p in parts], [p[_HEAD:] for p in parts]


def _bytes_of_all(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What every rank has, as many bytes of each, on the host.

    By gloo through the first rank: its gather of all ranks goes round them, one after the other.
    """
    if dist.get_backend(group) == "nccl":
        return of_every_rank(mine.cuda(), group).cpu()
    found = mine.new_empty(group.size(), len(mine))
    dist.gather(mine, [*found] if group.rank() == 0 else None, group=group, group_dst=0)
    return from_one(found, group)


def to_first(value: Any, group: dist.ProcessGroup | None) -> list[Any] | None:
    """Every rank's `value` on the first rank, which is any that can be pickled; None elsewhere."""
    if group is None or group.size() == 1:
        return [value]
    values: list[Any] | None = [None] * group.size() if group.rank() == 0 else None
    dist.gather_object(value, values, group=group, group_dst=0)
    return values


class Failure(NamedTuple):
    """What went wrong on a rank.

    Attributes:
        text: of the error.
        mistake: whether it is one of the user.
        end: what ends the rank, if nothing was wrong but it was told to end.
    """

    text: str
    mistake: bool
    end: SystemExit | None = None


def try_together(
    part: Callable[[], Any], group: dist.ProcessGroup | None
) -> tuple[Exception | SystemExit | None, list[Failure]]:
    """Do `part` on every rank, and wait for all of them: what went wrong here, and on any rank.

    A rank that raised at once would leave the others waiting for it. What `part` itself asks other
    ranks may have lost one: then this rank must not wait for those that wait for it.

    Raises:
        Exception: a rank is lost.
    """
    mine, (_, failure) = _tried(part, group)
    return mine, _failures(failure, group)


def _failures(mine: Failure | None, group: dist.ProcessGroup | None) -> list[Failure]:
    """What went wrong on all ranks; as a rule they tell each other only that nothing has."""
    if group is not None and group.size() > 1:
        failed = torch.tensor([mine is not None], dtype=torch.int32, device="cpu")
        if not largest(failed, group).item():
            return []
    return [found for found in of_all_ranks(mine, group) if found is not None]


def _tried(
    part: Callable[[], Found], group: dist.ProcessGroup | None
) -> tuple[Exception | SystemExit | None, tuple[Found | None, Failure | None]]:
    """What went wrong here, if anything, and what the others hear of it."""
    try:
        return None, (part(), None)
    except (Exception, SystemExit) as error:
        if is_lost(error):
            raise
        rank = 0 if group is None else group.rank()
        text = f"rank {rank}: {type(error).__name__}: {error}"
        end = error if isinstance(error, SystemExit) else None
        return error, (None, Failure(text, isinstance(error, ValueError), end))


def together(part: Callable[[], Found], group: dist.ProcessGroup | None) -> Found:
    """The value of `part` on every rank; what fails on one is raised on all of them.

    Raises:
        ValueError: on the ranks where nothing failed, with the text of a ValueError of another.
        RuntimeError: the same, of any other error.
        SystemExit: another rank was told to end.
    """
    mine, (value, failure) = _tried(part, group)
    error = _of_any(mine, _failures(failure, group))
    if error is not None:
        raise error
    return cast(Found, value)


def values_or_error(
    part: Callable[[], Found], group: dist.ProcessGroup | None
) -> tuple[list[Found], Exception | SystemExit | None]:
    """What `part` gives on every rank, or what `together` raises of it, by one exchange.

    What is raised is of the collective itself: the ranks have lost each other.
    """
    mine, told = _tried(part, group)
    values, failures = zip(*of_all_ranks(told, group), strict=True)
    return cast(list[Found], [*values]), _of_any(mine, [f for f in failures if f is not None])


def _of_any(
    mine: Exception | SystemExit | None, failures: Sequence[Failure]
) -> Exception | SystemExit | None:
    """What is raised here of what went wrong on any rank: on all ranks, or on none."""
    if mine is not None or not failures:
        return mine
    if failures[0].end is not None:
        return failures[0].end
    kind = ValueError if failures[0].mistake else RuntimeError
    return kind(failures[0].text)
