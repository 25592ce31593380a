"""Run a function on several ranks: fresh processes, one torch thread each, gloo or NCCL."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch
import torch.distributed as dist

import tests.gloo  # noqa: F401  one thread listens for all groups

# Importing these takes seconds; the fork server pays once and every rank starts from its image,
# which the last one keeps from being looked through, and so copied, by each rank's collector.
_PRELOAD = [
    "torch",
    "torch.distributed",
    "lightning.pytorch",
    "megatron.core.distributed",
    "megatron.core.models.gpt",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel",
    "transformers.models.llama.modeling_llama",
    "lightning_dhellam.autosearch",
    "lightning_dhellam.callbacks",
    "lightning_dhellam.checkpoint",
    "lightning_dhellam.data",
    "lightning_dhellam.module",
    "lightning_dhellam.strategy",
    "tests.frozen",
]
_HOST = "127.0.0.1"


class RankTraceback(Exception):
    """Cause of an exception that a rank raised: carries the rank's own traceback as text."""

    def __str__(self) -> str:
        return "\n" + str(self.args[0])


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 600,
    backend: str = "gloo",
) -> list[Any]:
    """Run ``function(rank, *args)`` in ``world_size`` fresh processes and return their results.

    With the backend ``nccl`` each rank has the GPU of its number.

    ``function`` must be importable (module level). The first exception of any rank is raised here,
    caused by a `RankTraceback`. ``timeout`` is in seconds; on failure or time-out every process is
    ended before the error is raised.
    """
    with _started(world_size, function, args, timeout, backend) as (processes, connections):
        results = _collect(connections, time.monotonic() + timeout, function, timeout)
        for process in processes:
            process.join(timeout=10)
        return results


def run_until_ended(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 600,
    backend: str = "gloo",
) -> list[int]:
    """Run ``function(rank, *args)`` where ranks may be killed: how the process of each has ended.

    Raises:
        TimeoutError: of those that are left none ends within ``timeout`` seconds.
    """
    with _started(world_size, function, args, timeout, backend) as (processes, _):
        left = {process.sentinel: rank for rank, process in enumerate(processes)}
        while left:
            ended = wait(list(left), timeout=timeout)
            if not ended:
                raise TimeoutError(f"ranks {[*left.values()]} do not end in {timeout:.0f} s")
            for sentinel in ended:
                del left[sentinel]  # type: ignore[arg-type]
        for process in processes:
            process.join()
        return [process.exitcode or 0 for process in processes]


@contextmanager
def _started(
    world_size: int, function: Callable[..., Any], args: tuple[Any, ...], timeout: float, by: str
) -> Iterator[tuple[list[ForkServerProcess], list[Connection]]]:
    """The processes and what they send; none of them is left afterwards."""
    store = dist.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    processes: list[ForkServerProcess] = []
    connections: list[Connection] = []
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(rank, world_size, store.port, timeout, by, sender, function, args),
                daemon=True,
            )
            process.start()
            sender.close()
            processes.append(process)
            connections.append(receiver)
        yield processes, connections
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        for connection in connections:
            connection.close()


def _collect(
    connections: list[Connection], deadline: float, function: Callable[..., Any], timeout: float
) -> list[Any]:
    results: dict[int, Any] = {}
    pending = {connection: rank for rank, connection in enumerate(connections)}
    while pending:
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = sorted(pending.values())
            raise TimeoutError(f"{function.__name__}: no result of ranks {missing} in {timeout} s")
        failures = []
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = pending.pop(connection)
            moment, value, error = _receive(connection, rank)
            if error is None:
                results[rank] = value
            else:
                failures.append((moment, error))
        if failures:
            # A dying rank breaks its peers' connections: the earliest failure is the cause.
            raise min(failures, key=lambda failure: failure[0])[1]
    return [results[rank] for rank in range(len(connections))]


def _receive(connection: Connection, rank: int) -> tuple[float, Any, BaseException | None]:
    try:
        moment, payload, text = pickle.loads(connection.recv_bytes())
    except EOFError:
        return 0.0, None, RuntimeError(f"rank {rank} ended without a result")
    if text is None:
        return moment, pickle.loads(payload), None
    try:
        error: BaseException = pickle.loads(payload)
    except Exception:
        error = RuntimeError(f"rank {rank} failed")
    error.__cause__ = RankTraceback(f"[rank {rank}]\n{text}")
    return moment, None, error


def _rank_main(
    rank: int,
    world_size: int,
    port: int,
    timeout: float,
    backend: str,
    sender: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    message: tuple[float, bytes, str | None]
    device = None
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    try:
        store = dist.TCPStore(_HOST, port, is_master=False)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout),
            device_id=device,
        )
        # One that ended at once would break the connections that the others are still making.
        store.set(f"connected-{rank}", "")
        store.wait([f"connected-{other}" for other in range(world_size)])
        # Plain pickle copies tensors by value, so nothing outlives the rank in shared memory.
        message = (time.monotonic(), pickle.dumps(function(rank, *args)), None)
    except BaseException as error:
        message = (time.monotonic(), _pickled_error(error), traceback.format_exc())
    sender.send_bytes(pickle.dumps(message))
    sender.close()
    if message[2] is None:
        dist.destroy_process_group()


def _pickled_error(error: BaseException) -> bytes:
    try:
        payload = pickle.dumps(error)
        pickle.loads(payload)
        return payload
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
