"""Whoever is gone, those that wait for it, or for one that waits, hear of it and end."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_dhellam import checkpoint
from lightning_dhellam.checkpoint.background import Background, group_beside
from lightning_dhellam.parallel import ParallelContext, presence
from lightning_dhellam.parallel.collectives import try_together
from lightning_dhellam.parallel.presence import Presence, presence_of_world
from tests.ranks import run_ranks, run_until_ended

WORLD, TIMEOUT = 4, timedelta(minutes=30)
KILLED = -signal.SIGKILL


def _of_world(run: int = 1) -> Presence:
    found = presence_of_world(TIMEOUT)
    assert found is not None and presence_of_world(TIMEOUT) is found
    found.enter(run)
    return found


def _wait_until(holds: Callable[[], object]) -> None:
    """However slow the machine is: the whole test has a limit."""
    while not holds():
        time.sleep(0.02)


def _meet(name: str) -> None:
    """Let all ranks come here, by the store alone."""
    store = dist.distributed_c10d._get_default_store()
    store.add(name, 1)
    _wait_until(lambda: store.add(name, 0) >= dist.get_world_size())


def _killed(rank: int, folder: Path, victim: int) -> None:
    found = _of_world()
    assert found.lost is None
    _meet("all")
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL)
    _wait_until(lambda: found.lost)
    (folder / str(rank)).write_text(f"{found.lost}")
    _meet_left(rank, victim)


def _meet_left(rank: int, victim: int) -> None:
    """None ends before the others have heard of the victim by it, and of nobody else."""
    store = dist.distributed_c10d._get_default_store()
    store.add("left", 1)
    _wait_until(lambda: store.add("left", 0) == WORLD - 1)


@pytest.mark.parametrize("victim", [0, 2])
def test_all_hear_who_was_killed(tmp_path: Path, victim: int) -> None:
    ends = run_until_ended(WORLD, _killed, tmp_path, victim, timeout=240)
    assert ends[victim] == KILLED
    for rank in {*range(WORLD)} - {victim}:
        said = (tmp_path / str(rank)).read_text()
        assert said.startswith(f"rank {victim} (process "), said
        assert said.endswith("which was killed or has ended without a word")


def _leaving(rank: int, world: int) -> None:
    found = _of_world()
    if rank == 1:
        found.leave(None)
    _meet("well")
    if rank == 2:
        found.leave("KeyError")
    else:
        _wait_until(lambda: rank == 1 or found.lost)
    if rank not in (1, 2):
        assert found.lost is not None and "which has left the run by KeyError" in found.lost
        assert found.lost.startswith("rank 2 (process ")
        found.leave("RuntimeError")
    _meet("badly")
    found.enter(2)  # a run that failed on all is over
    assert found.lost is None
    found.leave(None)
    _meet("over")


def test_who_ends_a_run_well_is_not_missed_and_others_are() -> None:
    run_ranks(WORLD, _leaving, WORLD)


def _later(rank: int, folder: Path) -> None:
    found = _of_world()
    found.leave(None)
    _meet("first")
    if rank == 0:
        os._exit(0)
    if rank == 1:  # has seen it, in no run
        _wait_until(lambda: len(found._neighbours) == 1)
    found.enter(2)
    _wait_until(lambda: found.lost)
    (folder / str(rank)).write_text(f"{found.lost}")
    _wait_until(lambda: all((folder / str(other)).exists() for other in (1, 2)))


def test_who_ends_after_a_run_is_missed_in_the_next(tmp_path: Path) -> None:
    run_until_ended(3, _later, tmp_path, timeout=240)
    for rank in (1, 2):
        assert (tmp_path / str(rank)).read_text().startswith("rank 0 (process ")


def _waiting(rank: int, folder: Path) -> None:
    presence.GRACE = 0.5
    _of_world()
    _meet("all")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    said = os.open(folder / str(rank), os.O_CREAT | os.O_WRONLY)
    os.dup2(said, 2)
    # By a store, no connection of which ends.
    dist.distributed_c10d._get_default_store().wait(["never"], TIMEOUT)


def test_a_wait_without_an_end_ends_and_says_for_whom(tmp_path: Path) -> None:
    ends = run_until_ended(3, _waiting, tmp_path, timeout=240)
    assert ends == [1, KILLED, 1]
    for rank in (0, 2):
        said = (tmp_path / str(rank)).read_text()
        assert said.startswith(f"rank {rank} (process ")
        assert "has waited 0 s, in _waiting (" in said and "since it lost rank 1 (process" in said


def _forked(rank: int, folder: Path) -> None:
    found = _of_world()
    _meet("all")
    if rank == 1:
        if os.fork():
            os.kill(os.getpid(), signal.SIGKILL)
        _wait_until((folder / "heard").exists)  # as a worker of a DataLoader does not end at once
        os._exit(0)
    _wait_until(lambda: found.lost)
    (folder / "heard").touch()


def test_a_child_of_the_lost_one_does_not_hide_it(tmp_path: Path) -> None:
    assert run_until_ended(2, _forked, tmp_path, timeout=240)[1] == KILLED
    assert (tmp_path / "heard").exists()


def _strangers(rank: int, world: int) -> None:
    found = _of_world()
    _meet("all")
    port = found._server.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b'{"token": "guessed", "rank": 7, "who": "nobody"}\n')
        assert stranger.recv(10) == b""
    with socket.create_connection(("127.0.0.1", port)) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
    _wait_until(lambda: len(found._neighbours) == 2)
    _meet("asked")
    assert {neighbour.rank for neighbour in found._neighbours} == {1 - rank}
    assert found.lost is None
    found.leave(None)
    _meet("over")


def test_strangers_are_not_let_in() -> None:
    run_ranks(2, _strangers, 2)


def _saving(rank: int, world: int, folder: Path) -> None:
    context = ParallelContext.create(torch.device("cpu"))
    found = _of_world()
    beside = group_beside(context, TIMEOUT)
    background = Background(context.device, context.host_group, beside, found)
    weights = {"w": torch.ones(4)}
    prepared = checkpoint.prepare(folder / "a.ckpt", context, {"value": 1}, weights, {})
    if rank == 0:  # in the thread that writes
        prepared.tensors.write = lambda: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    background.start(prepared)
    if rank == 0:
        time.sleep(600)
    # A step's transfers: rank 2 waits for the lost one, the others for rank 2, which knows already.
    with pytest.raises(RuntimeError):
        dist.recv(torch.zeros(1), 0 if rank == 2 else 2, group=context.host_group)
    error = background.settle()
    (folder / str(rank)).write_text(f"{error}")
    raise RuntimeError("the run ends")


def test_who_has_lost_a_rank_does_not_wait_for_what_is_written(tmp_path: Path) -> None:
    ends = run_until_ended(WORLD, _saving, WORLD, tmp_path, timeout=240)
    assert ends[0] == KILLED
    assert "a.ckpt was not written: this rank has lost rank 0" in (tmp_path / "2").read_text()
    assert not (tmp_path / "a.ckpt").exists()


def test_a_part_that_loses_a_rank_does_not_ask_the_others_again() -> None:
    def part() -> None:
        raise RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:1] Connection closed")

    with pytest.raises(RuntimeError, match="Connection closed"):
        try_together(part, None)
    mistake, failures = try_together(lambda: int("x"), None)  # type: ignore[arg-type,return-value]
    assert isinstance(mistake, ValueError) and failures[0].mistake
