"""Exchanges by copy engine, between GPUs of one host: each rank pulls what another has laid out.

Where only one of two ranks sends, as along the edges of a pipeline, it goes the same way.

Both see the memory where it lies (torch's symmetric memory), in two places that take turns, so that
one may be pulled while the next is laid out:

    sender     lay out 0  ready | lay out 1  ready |  taken? lay out 0 ...
    receiver           ready? pull 0  taken | ready? pull 1  taken ...

Signals are awaited on the device, by the stream that is current, and for no longer than groups wait
(`overdue.py`). Between two H200 with NVLink (2026-11-29) such a pull of 64 MiB moved 363 GB/s each
way, also beside GEMMs, which lost 1 to 2%; NCCL's send and receive 244. `choice.py` says where it
is used.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import zip_longest
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_dhellam.parallel.overdue import Overdue
from lightning_dhellam.parallel.transport import Transport, as_bytes
from lightning_dhellam.parallel.work import Work
from lightning_dhellam.plan import Collective

PIECE = 32 << 20
"""Bytes of a place. What is larger goes in several turns."""
_PLACES = 2
_ALIGNED = 512


def piece_of(crossing: int) -> int:
    """Bytes of a place, where so many are handed on at a time."""
    return min(PIECE, -(-max(crossing, 1) // _ALIGNED) * _ALIGNED)


class Memory(Protocol):
    """Memory of every rank that all of them see, and signals between them.

    A signal is put for one rank, and awaited once, by the numbers of sender and channel.
    """

    def get_buffer(
        self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype, storage_offset: int = 0
    ) -> Tensor:
        """What a rank has there."""

    def put_signal(self, dst_rank: int, channel: int = 0, timeout_ms: int = 0) -> None:
        """Signal to a rank."""

    def wait_signal(self, src_rank: int, channel: int = 0, timeout_ms: int = 0) -> None:
        """Await the signal of a rank."""


def own_memory(device: torch.device, piece: int = PIECE, parts: int = 1) -> Tensor:
    """This rank's share of such memory, in parts of two places: there may be no room for it."""
    import torch.distributed._symmetric_memory as symmetric

    laid_out: Tensor = symmetric.empty(parts * _PLACES * piece, dtype=torch.uint8, device=device)
    return laid_out


def open_memory(laid_out: Tensor, group: ProcessGroup) -> Memory:
    """Let the GPUs of `group` see each other's memory. Every rank of it must call this."""
    import torch.distributed._symmetric_memory as symmetric

    memory: Memory = symmetric.rendezvous(laid_out, group)
    return memory


class SharedMemoryTransport:
    """Carries exchanges through memory that ranks share, and other collectives as before.

    Args:
        memory: with two places of `piece` bytes for each rank and part.
        rank: of this process in it.
        others: what carries the collectives that are no exchanges.
        piece: bytes of a place.
        number: of the part of the memory that it has for itself.
        overdue: ends the process where a signal does not come; None to wait for ever.
        way: what it is called there.
        ranks: who sees the memory, by their numbers among all ranks; as in it if not given.
    """

    def __init__(
        self,
        memory: Memory,
        rank: int,
        others: Transport,
        piece: int = PIECE,
        number: int = 0,
        overdue: Overdue | None = None,
        way: str = "",
        ranks: Sequence[int] = (),
    ) -> None:
        self._memory = memory
        self._rank = rank
        self._others = others
        self._piece = piece
        self._first = number * _PLACES
        self._overdue = overdue
        self._way = way
        self._ranks = ranks
        # Who has still to say that what lies in a place was taken.
        self._readers: list[int | None] = [None] * _PLACES
        # Pieces by rank, which both ends count alike.
        self._sent: Counter[int] = Counter()
        self._pulled: Counter[int] = Counter()

    def part(self, number: int, way: str) -> SharedMemoryTransport:
        """The same by another part of the memory, so that neither waits for the other."""
        return SharedMemoryTransport(
            self._memory,
            self._rank,
            self._others,
            self._piece,
            number,
            self._overdue,
            way,
            self._ranks,
        )

    def exchange(
        self, sent: Sequence[Tensor], received: Sequence[Tensor], target: int, source: int
    ) -> None:
        """See `Transport`."""
        pairs = zip_longest(self._pieces(sent), self._pieces(received))
        with self._watching(sent, received, target, source):
            for leaving, arriving in pairs:
                if leaving is not None:
                    self._lay_out(leaving, target)
                if arriving is not None:
                    self._pull(arriving, source)

    def all_gather(self, x: Tensor, out: Tensor) -> Work | None:
        """See `Transport`."""
        return self._others.all_gather(x, out)

    def reduce_scatter(self, x: Tensor, out: Tensor) -> Work | None:
        """See `Transport`."""
        return self._others.reduce_scatter(x, out)

    def all_to_all(
        self,
        sent: Sequence[Tensor],
        received: Sequence[Tensor],
        given: Sequence[int],
        taken: Sequence[int],
    ) -> Work | None:
        """See `Transport`."""
        return self._others.all_to_all(sent, received, given, taken)

    def processors(self, collective: Collective) -> int:
        """See `Transport`."""
        # Who waits for a signal is one thread.
        return 1 if collective is Collective.EXCHANGE else self._others.processors(collective)

    def _watching(
        self, sent: Sequence[Tensor], received: Sequence[Tensor], target: int, source: int
    ) -> AbstractContextManager[None]:
        """Looks after what the device then waits for."""
        if self._overdue is None or not (sent or received):
            return nullcontext()
        other = source if received else target
        whom = f"rank {self._ranks[other] if self._ranks else other}"
        return self._overdue.watching(self._way, whom, (*sent, *received)[0].device)

    def _pieces(self, tensors: Sequence[Tensor]) -> Iterator[Tensor]:
        """The bytes of the tensors, as much at a time as a place holds."""
        for x in tensors:
            if x.numel():
                yield from as_bytes(x).flatten().split(self._piece)

    def _lay_out(self, piece: Tensor, target: int) -> None:
        place = self._sent[target] % _PLACES
        reader = self._readers[place]
        if reader is not None:
            self._memory.wait_signal(reader, self._taken(place))
        self._place(self._rank, place, len(piece)).copy_(piece)
        self._memory.put_signal(target, self._ready(place))
        self._readers[place] = target
        self._sent[target] += 1

    def _pull(self, piece: Tensor, source: int) -> None:
        place = self._pulled[source] % _PLACES
        self._memory.wait_signal(source, self._ready(place))
        piece.copy_(self._place(source, place, len(piece)))
        self._memory.put_signal(source, self._taken(place))
        self._pulled[source] += 1

    def _place(self, rank: int, place: int, size: int) -> Tensor:
        """The first `size` bytes of a place of a rank."""
        offset = (self._first + place) * self._piece
        return self._memory.get_buffer(rank, (size,), torch.uint8, offset)

    def _ready(self, place: int) -> int:
        return 2 * self._first + place

    def _taken(self, place: int) -> int:
        return 2 * self._first + _PLACES + place
