"""Transfers between stages by copy engine bring what process groups bring, whatever the schedule.

Processes of one machine see one file in place of each other's GPU, and a thread for each edge is
its stream. GPUs: tests/gpu.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from lightning_dhellam.layers import lower
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.copy_engine import SharedMemoryTransport
from lightning_dhellam.parallel.edges import open_edges, parts_of
from lightning_dhellam.parallel.transport import Alone
from lightning_dhellam.pipeline.schedules import SCHEDULES, Placement, Scheme
from lightning_dhellam.pipeline.schedules.named import Written
from tests.engine.harness import CPU, batch_of, differing, engine_of, pieces, prepared, train
from tests.models.llama import SMALL
from tests.pipeline.random_schedules import random_schedule
from tests.plan.graphs import random_builder
from tests.ranks import run_ranks

PIECE = 512
"""Bytes, so that a message goes in several turns."""
CHANNELS = 64
TIMEOUT = timedelta(minutes=5)
COUNT = 7
CONFIG = replace(SMALL, num_layers=6, hidden_dropout=0.1, tie_embeddings=True)


class OfFile:
    """Memory that processes see in one file, with a signal in a byte of another."""

    def __init__(self, folder: Path, rank: int, ranks: int, size: int) -> None:
        self._rank, self._ranks, self._size = rank, ranks, size
        self._laid_out = _bytes(folder / "laid_out", ranks * size)
        self._signals = _bytes(folder / "signals", ranks * ranks * CHANNELS)

    def get_buffer(
        self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype, storage_offset: int = 0
    ) -> Tensor:
        assert storage_offset + sizes[0] <= self._size, "beyond what a rank has"
        return self._laid_out[rank * self._size + storage_offset :][: sizes[0]]

    def put_signal(self, dst_rank: int, channel: int = 0, timeout_ms: int = 0) -> None:
        self._turn(self._place(self._rank, dst_rank, channel), 0, 1)

    def wait_signal(self, src_rank: int, channel: int = 0, timeout_ms: int = 0) -> None:
        self._turn(self._place(src_rank, self._rank, channel), 1, 0)

    def _place(self, source: int, target: int, channel: int) -> int:
        assert 0 <= channel < CHANNELS
        return (source * self._ranks + target) * CHANNELS + channel

    def _turn(self, place: int, before: int, after: int) -> None:
        deadline = time.monotonic() + 300
        while self._signals[place] != before:
            assert time.monotonic() < deadline, "waits for ever"
            time.sleep(1e-5)
        self._signals[place] = after


def _bytes(path: Path, size: int) -> Tensor:
    return torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)


class Streamed:
    """Exchanges one by one, as on the stream of an edge."""

    def __init__(self, transport: SharedMemoryTransport, thread: ThreadPoolExecutor) -> None:
        self._transport = transport
        self._thread = thread

    def exchange(
        self, sent: Sequence[Tensor], received: Sequence[Tensor], target: int, source: int
    ) -> Started:
        return Started(
            self._thread.submit(self._transport.exchange, sent, received, target, source)
        )


class Started:
    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result(timeout=300)

    def is_completed(self) -> bool:
        return self._future.done()


@contextmanager
def _by_files(context: ParallelContext, folder: str) -> Iterator[ParallelContext]:
    """The same context, whose stages see each other's memory."""
    topology, placement = context.topology, context.placement
    size = parts_of(placement, tied=True) * 2 * PIECE
    memory = OfFile(Path(folder), topology.pp_rank, topology.pp_size, size)
    between = SharedMemoryTransport(memory, topology.pp_rank, Alone(), PIECE)
    edges = open_edges(topology, placement, between, context.device, TIMEOUT, tied=True)
    threads = {edge: ThreadPoolExecutor(1) for edge in edges}
    streamed = {edge: Streamed(one, threads[edge]) for edge, one in edges.items()}
    try:
        yield replace(context, edges=streamed)
    finally:
        for thread in threads.values():
            thread.shutdown()


def _schemes(placement: Placement) -> dict[str, Scheme]:
    """Those with names, and some in which more messages are under way than there are places."""
    stages = placement.stages
    named = {n: make for n, make in SCHEDULES.items() if make(stages, 1).placement == placement}
    drawn = [random_schedule(seed, placement, COUNT) for seed in range(3)]
    return named | {str(schedule): Written(schedule, "random") for schedule in drawn}


def wrong_by(
    context: ParallelContext, other: ParallelContext, dtype: torch.dtype = torch.float32
) -> list[str]:
    """Schedules by which the stages of `other` compute something else than those of `context`."""
    model = prepared(CONFIG, context, dtype).to(context.device)
    batch = {n: x.to(context.device) for n, x in batch_of(CONFIG, 2 * COUNT - 1, 16).items()}
    micro_batches = pieces(batch, 2, context)
    wrong = []
    for index, (name, scheme) in enumerate(_schemes(context.placement).items()):
        outcomes = []
        for each in (context, other):
            model.context = each
            engine = engine_of(
                lower(model, scheme=scheme), context.device, random_builder(index), poison=True
            )
            outcomes.append(train(engine, model, micro_batches))
            outcomes[-1][1]["evaluated"] = engine.evaluate(micro_batches)
        model.context = context
        if differing(*outcomes):
            wrong.append(f"{name}: {differing(*outcomes)}")
    return wrong


def _of_stage(rank: int, folder: str) -> list[str]:
    wrong = []
    for number, placement in enumerate((Placement.folded(3), Placement.straight(3, 2))):
        context = ParallelContext.create(CPU, pipeline_parallel_size=3, placement=placement)
        with _by_files(context, str(Path(folder) / str(number))) as other:
            wrong += wrong_by(context, other)
        context.destroy()
    return wrong


def test_what_is_pulled_is_what_process_groups_bring(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        for name, size in {"laid_out": 1 << 20, "signals": 1 << 16}.items():
            (tmp_path / str(number) / name).write_bytes(bytes(size))
    assert run_ranks(3, _of_stage, str(tmp_path)) == [[], [], []]
