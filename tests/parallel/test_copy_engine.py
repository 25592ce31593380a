"""Exchanges through memory that ranks share, with threads for ranks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import Queue

import pytest
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_dhellam.parallel.collectives import exchange
from lightning_dhellam.parallel.communicator import Communicator
from lightning_dhellam.parallel.copy_engine import SharedMemoryTransport
from lightning_dhellam.parallel.transport import Alone
from lightning_dhellam.plan import Collective, Lane
from tests.parallel.test_collectives import passed_on, received

PIECE = 24
"""Bytes, so that what is exchanged goes in many turns."""


class Shared:
    """What a device gives: two places for each rank, and signals that are put and awaited once."""

    def __init__(self, ranks: int) -> None:
        self.laid_out = [torch.zeros(2 * PIECE, dtype=torch.uint8) for _ in range(ranks)]
        self.signals: dict[tuple[int, int, int], Queue[None]] = {}
        for source in range(ranks):
            for target in range(ranks):
                for channel in range(4):
                    self.signals[source, target, channel] = Queue(maxsize=1)


class View:
    """The same as one rank sees it."""

    def __init__(self, shared: Shared, rank: int) -> None:
        self.shared = shared
        self.rank = rank

    def get_buffer(
        self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype, storage_offset: int = 0
    ) -> Tensor:
        return self.shared.laid_out[rank][storage_offset:][: sizes[0]].view(dtype)

    def put_signal(self, dst_rank: int, channel: int = 0, timeout_ms: int = 0) -> None:
        self.shared.signals[self.rank, dst_rank, channel].put(None, timeout=20)

    def wait_signal(self, src_rank: int, channel: int = 0, timeout_ms: int = 0) -> None:
        self.shared.signals[src_rank, self.rank, channel].get(timeout=20)


def _communicators(ranks: int) -> list[Communicator]:
    shared = Shared(ranks)
    return [
        Communicator(
            Lane.CP,
            ProcessGroup(rank, ranks),  # type: ignore[call-arg]
            SharedMemoryTransport(View(shared, rank), rank, Alone(), PIECE),
            rank,
            ranks,
        )
        for rank in range(ranks)
    ]


def _both_ways_round(on: Communicator) -> None:
    """Rings in turns of direction and size, so that each place has readers that change."""
    passed_on(on)
    for step in range(1, 6):
        way = 1 if step % 2 else -1
        target, source = (on.rank + way) % on.size, (on.rank - way) % on.size
        sent = torch.arange(step * 5) + 100 * on.rank
        (got,) = received(exchange(on, sent, target=target, source=source))
        assert torch.equal(got, torch.arange(step * 5) + 100 * source)
    passed_on(on)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_what_goes_round_is_what_arrives(ranks: int) -> None:
    with ThreadPoolExecutor(ranks) as threads:
        for done in [threads.submit(partial(_both_ways_round, on)) for on in _communicators(ranks)]:
            done.result(timeout=60)


def test_other_collectives_go_as_before() -> None:
    (on,) = _communicators(1)
    x = torch.rand(2, 3)
    out = torch.empty(2, 3)
    on.transport.all_gather(x, out)
    assert torch.equal(out, x)
    assert on.processors(Collective.EXCHANGE) == 1 and on.processors(Collective.ALL_GATHER) == 0
