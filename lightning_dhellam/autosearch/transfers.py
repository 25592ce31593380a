"""Times transfers between neighbouring stages of a pipeline, as steps have them: both ways at once.

Stages 0 and 1, 2 and 3 and so on exchange a message, and then stages 1 and 2, 3 and 4, so that a
stage sends one message at a time and receives one. Each pair does so while nothing computes, and
then while both compute as hard as they can.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dhellam.engine import Engine
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.collectives import largest
from lightning_dhellam.plan import Strand
from lightning_dhellam.search.measure import Transfer

_SHARES = (1.0, 0.25)
"""Of the bytes of a message: from two sizes a bandwidth and a latency follow."""
_ROUNDS = 5
_EACH = 8
"""Messages in a row, of which each round tells the mean."""
_SIDE = {"cuda": 4096, "cpu": 192}
"""Rows and columns of the matrices that are multiplied meanwhile."""
_LONGER = 1.3
"""How many times as long as the messages computation is to last."""


def take_transfers(engine: Engine, context: ParallelContext, tokens: int) -> tuple[Transfer, ...]:
    """Measure what this stage sends to its neighbours. Every rank of the run must call this.

    Args:
        engine: whose layers tell how large messages are.
        context: the communicators of this rank's pipeline.
        tokens: of a micro-batch.
    """
    if context.topology.pp_size == 1 or context.emulated:
        return ()
    own = torch.tensor([_message(engine) * tokens], dtype=torch.float64)
    size = float(largest(own, context.world_group))
    stage, stages = context.topology.pp_rank, context.topology.pp_size
    timer = _Timer(context)
    found = []
    for first in range(2):
        other = stage + 1 if stage % 2 == first else stage - 1
        for share in _SHARES:
            count = max(4, int(size * share))
            # Who has no neighbour in this turn goes along: ranks of a stage compare their times.
            times = timer.exchanged(other if 0 <= other < stages else None, count)
            seconds, beside, takes = largest(
                torch.tensor(times, dtype=torch.float64), context.stage_group
            ).tolist()
            if 0 <= other < stages:
                found.append(Transfer(stage, other, float(count), seconds, beside, takes))
    return tuple(found)


def _message(engine: Engine) -> float:
    """Bytes per token of the largest message that this stage sends."""
    sizes = [0.0]
    for pair in engine.layers:
        for graph in (pair.forward, pair.backward):
            if graph.sends:
                sizes.append(sum(graph.bytes_per_token.get(slot, 0.0) for slot in graph.outputs))
    return max(sizes)


class _Timer:
    """Times exchanges of this rank."""

    def __init__(self, context: ParallelContext) -> None:
        self._context = context
        self._device = context.device
        self._cuda = context.device.type == "cuda"
        side = _SIDE[context.device.type]
        dtype = torch.bfloat16 if self._cuda else torch.float32
        self._matrix = torch.ones(side, side, device=context.device, dtype=dtype)
        self._product = torch.empty_like(self._matrix)

    def exchanged(self, other: int | None, size: int) -> tuple[float, float, float]:
        """Exchange messages of `size` bytes with a stage, if there is one.

        Returns seconds of a message alone, and beside compute, and the share of that which it took.
        """
        if other is None:
            for _ in range(1 + 2 * _ROUNDS):
                self._meet()
            return 0.0, 0.0, 0.0
        out, into = (torch.zeros(size, dtype=torch.uint8, device=self._device) for _ in range(2))

        def begun() -> list[dist.Work]:
            return self._begun(other, out, into)

        def exchange() -> None:
            _end(begun())

        self._meet()
        exchange()  # the first one may connect
        alone, beside, taken = list[float](), list[float](), list[float]()
        for _ in range(_ROUNDS):
            self._meet()
            alone.append(self._seconds(exchange) / _EACH)
        once = max(self._seconds(self._compute), 1e-9) / _EACH
        products = max(1, round(_LONGER * median(alone) * _EACH / once))
        still = median(self._seconds(self._compute, products) for _ in range(_ROUNDS))
        for _ in range(_ROUNDS):
            self._meet()
            computed, sent = self._both(begun, products)
            if not self._cuda and sent <= 1.05 * computed:
                sent = min(computed, _EACH * median(alone))  # nobody has seen when it was over
            beside.append(sent / _EACH)
            taken.append((computed - still) / max(min(sent, computed), 1e-9))
        return median(alone), median(beside), max(0.0, median(taken))

    def _meet(self) -> None:
        """Begin together, all stages."""
        self._synchronize()
        dist.barrier(self._context.host_group)

    def _begun(self, other: int, out: Tensor, into: Tensor) -> list[dist.Work]:
        """Begin to exchange a message."""
        here, edges = self._context.topology.pp_rank, self._context.edges
        strand = str(Strand.FORWARD)
        works = (
            dist.irecv(into, group=edges[other, here, strand], group_src=other),
            dist.isend(out, group=edges[here, other, strand], group_dst=other),
        )
        return [work for work in works if work is not None]

    def _compute(self) -> None:
        torch.mm(self._matrix, self._matrix, out=self._product)

    def _seconds(self, run: Callable[[], None], times: int = _EACH) -> float:
        """Seconds of so many runs in a row."""
        if not self._cuda:
            begin = time.perf_counter()
            for _ in range(times):
                run()
            return time.perf_counter() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000

    def _both(self, begun: Callable[[], list[dist.Work]], products: int) -> tuple[float, float]:
        """Seconds of computation, and of the messages meanwhile.

        On a host other threads have the messages in hand, and tell only whether they are done.
        """
        if not self._cuda:
            begin = time.perf_counter()
            works = [work for _ in range(_EACH) for work in begun()]
            computed = self._seconds(self._compute, products)
            _end(works)
            return computed, time.perf_counter() - begin
        start, sent, done = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        side = torch.cuda.Stream(self._device)
        start.record()
        side.wait_event(start)
        with torch.cuda.stream(side):
            for _ in range(_EACH):
                _end(begun())
            sent.record()
        for _ in range(products):
            self._compute()
        done.record()
        self._synchronize()
        return float(start.elapsed_time(done)) / 1000, float(start.elapsed_time(sent)) / 1000

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize(self._device)


def _end(works: Sequence[dist.Work]) -> None:
    """Wait for them: on the host, or on a GPU the stream that is current."""
    for work in works:
        work.wait()
