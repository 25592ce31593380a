"""Times transfers between neighbouring stages of a pipeline, as steps have them: both ways at once.

Pairs of stages take turns, 0 and 1 beside 2 and 3 and so on, then 1 and 2 beside 3 and 4, so that a
stage sends one message at a time and receives one. Each pair exchanges messages while nothing
computes, and then while both compute as hard as they can. Where receives are kernels that spin,
they also compute beside a receive whose message comes later.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_dhellam.engine import Engine
from lightning_dhellam.engine.lanes import CYCLES
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.collectives import Pending, largest, receive, send
from lightning_dhellam.parallel.work import Work
from lightning_dhellam.plan import Collective
from lightning_dhellam.plan.placement import Edge
from lightning_dhellam.search.measure import Transfer

_LEAD = 0.02
"""Seconds for which a device sleeps while its host issues what is timed: messages take a host so
long that they would seem to take it from compute."""
_SHARES = (1.0, 0.25)
"""Of the bytes of a message: from two sizes a bandwidth and a latency follow."""
_ROUNDS = 5
_EACH = 8
"""Messages in a row, of which each round tells the mean."""
_SIDE = {"cuda": 4096, "cpu": 192}
"""Rows and columns of the matrices that are multiplied meanwhile."""
_MOST = 0.9
"""Share of computation that messages take at most, whatever disturbs a host."""
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
    stage = context.topology.pp_rank
    timer, spins = _Timer(context), _spins(context)
    found = []
    for pairs in _turns(context.edges):
        other = next((sum(pair) - stage for pair in pairs if stage in pair), None)
        for share in _SHARES:
            count = max(4, int(size * share))
            # Who has no neighbour in this turn goes along: ranks of a stage compare their times.
            times = torch.tensor(timer.exchanged(other, count, spins), dtype=torch.float64)
            seconds, beside, takes, waits = largest(times, context.stage_group).tolist()
            if other is not None:
                row = Transfer(stage, other, float(count), seconds, beside, takes, spins)
                found.append(replace(row, waits=waits if spins else None))
    return tuple(found)


def _spins(context: ParallelContext) -> bool:
    """Whether a receive keeps more than a thread of a device that waits: all edges are alike."""
    return any(one.processors(Collective.EXCHANGE) > 1 for one in context.edges.values())


def _turns(edges: Iterable[Edge]) -> list[list[tuple[int, int]]]:
    """Pairs of stages that have an edge, in turns in which each stage is in one pair."""
    turns: list[list[tuple[int, int]]] = []
    for pair in sorted({(min(edge[:2]), max(edge[:2])) for edge in edges}):
        free = [turn for turn in turns if not {*pair} & {stage for one in turn for stage in one}]
        if free:
            free[0].append(pair)
        else:
            turns.append([pair])
    return turns


def _message(engine: Engine) -> float:
    """Bytes per token of the largest message that this stage sends."""
    sizes = [0.0]
    for pair in engine.layers:
        for graph in (pair.forward, pair.backward):
            if graph.sends:
                sizes.append(sum(graph.bytes_per_token.get(slot, 0.0) for slot in graph.outputs))
    return max(sizes)


_Way = Callable[[], Pending]


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
        # What is sent waits for nothing that is received, as in a step: a stream for each.
        self._streams = [torch.cuda.Stream(self._device) for _ in range(2)] if self._cuda else []

    def exchanged(
        self, other: int | None, size: int, spins: bool
    ) -> tuple[float, float, float, float]:
        """Exchange messages of `size` bytes with a stage, if there is one.

        Returns seconds of a message alone, and beside compute, the share of that which it took, and
        the share which a receive that waits took, if it `spins`.
        """
        if other is None:
            for _ in range(1 + (2 + spins) * _ROUNDS):
                self._meet()
            return 0.0, 0.0, 0.0, 0.0
        out, into = (torch.zeros(size, dtype=torch.uint8, device=self._device) for _ in range(2))
        ways = self._ways(other, out, into)
        messages = partial(self._messages, ways)
        self._meet()
        self._timed(messages, 1)  # the first ones may connect, and load kernels
        alone, beside, taken = list[float](), list[float](), list[float]()
        for _ in range(_ROUNDS):
            self._meet()
            alone.append(self._timed(messages, 0)[1] / _EACH)
        once = max(self._timed(None, _EACH)[0] / _EACH, 1e-9)
        products = max(1, round(_LONGER * median(alone) * _EACH / once))
        still = median(self._timed(None, products)[0] for _ in range(_ROUNDS))
        for _ in range(_ROUNDS):
            self._meet()
            computed, sent = self._timed(messages, products)
            if not self._cuda and sent <= 1.05 * computed:
                sent = min(computed, _EACH * median(alone))  # nobody has seen when it was over
            beside.append(sent / _EACH)
            taken.append((computed - still) / max(min(sent, computed), 1e-9))
        waiting = [self._waited(*ways, products) for _ in range(_ROUNDS * spins)]
        waits = 1 - still / median(waiting) if waiting else 0.0
        taking, waiting_takes = (min(max(0.0, one), _MOST) for one in (median(taken), waits))
        return median(alone), median(beside), taking, waiting_takes

    def _waited(self, send_on: _Way, receive_on: _Way, products: int) -> float:
        """Seconds of so many products beside a receive whose message is sent behind them."""
        self._meet()
        if not self._cuda:
            received, begin = receive_on().work, time.perf_counter()
            self._compute(products)
            computed = time.perf_counter() - begin
            for work in (send_on().work, received):
                if work is not None:
                    work.wait()
            return computed
        start, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(round(_LEAD * CYCLES))
        start.record()
        sending, receiving = self._streams
        receiving.wait_event(start)
        with torch.cuda.stream(receiving):
            receive_on()
        self._compute(products)
        done.record()
        sending.wait_event(done)
        with torch.cuda.stream(sending):
            send_on()
        torch.cuda.synchronize(self._device)
        return float(start.elapsed_time(done)) / 1000

    def _meet(self) -> None:
        """Begin together, all stages."""
        if self._cuda:
            torch.cuda.synchronize(self._device)
        dist.barrier(self._context.host_group)

    def _ways(self, other: int, out: Tensor, into: Tensor) -> tuple[_Way, _Way]:
        """What sends a message to a stage, and what receives one."""
        here, edges = self._context.topology.pp_rank, self._context.edges
        away = next(edges[edge] for edge in edges if edge[:2] == (here, other))
        back = next(edges[edge] for edge in edges if edge[:2] == (other, here))
        return partial(send, out, other, away), partial(receive, into, other, back)

    def _messages(self, ways: tuple[_Way, _Way]) -> list[Work]:
        """Send and receive some in a row. Returns what is to be waited for on a host."""
        works = []
        for _ in range(_EACH):
            for number, way in enumerate(ways):
                with torch.cuda.stream(self._streams[number]) if self._cuda else nullcontext():
                    works.append(way().work)
        return [work for work in works if work is not None]

    def _timed(
        self, messages: Callable[[], list[Work]] | None, products: int
    ) -> tuple[float, float]:
        """Seconds of so many products, and of messages meanwhile.

        On a host other threads have the messages in hand, and tell only whether they are done.
        """
        if not self._cuda:
            begin = time.perf_counter()
            works = messages() if messages is not None else []
            middle = time.perf_counter()
            self._compute(products)
            computed = time.perf_counter() - middle
            for work in works:
                work.wait()
            return computed, time.perf_counter() - begin
        start, done, *ends = (
            torch.cuda.Event(enable_timing=True) for _ in range(2 + len(self._streams))
        )
        torch.cuda._sleep(round(_LEAD * CYCLES))
        start.record()
        for stream in self._streams:
            stream.wait_event(start)
        if messages is not None:
            messages()
        for stream, end in zip(self._streams, ends, strict=True):
            end.record(stream)
        self._compute(products)
        done.record()
        torch.cuda.synchronize(self._device)
        sent = max(start.elapsed_time(end) for end in ends)
        return float(start.elapsed_time(done)) / 1000, float(sent) / 1000

    def _compute(self, products: int) -> None:
        for _ in range(products):
            torch.mm(self._matrix, self._matrix, out=self._product)
