"""A device that waits for another one by copy engine does not wait for ever. GPUs: tests/gpu."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from lightning_dhellam.parallel import presence
from lightning_dhellam.parallel.copy_engine import SharedMemoryTransport
from lightning_dhellam.parallel.overdue import Overdue
from lightning_dhellam.parallel.presence import presence_of_world
from lightning_dhellam.parallel.transport import Alone
from tests.pipeline.test_transfers import PIECE, OfFile
from tests.ranks import run_until_ended

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EDGE = "edge forward 0→1"
LONG = timedelta(hours=1)


class Mark:
    """In place of an event of a device: over when a test says so."""

    made: list[Mark]

    def __init__(self) -> None:
        self.is_over = False
        self.made.append(self)

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return self.is_over


@pytest.fixture
def marks(monkeypatch: pytest.MonkeyPatch) -> list[Mark]:
    Mark.made = []
    monkeypatch.setattr(torch.cuda, "Event", Mark)
    return Mark.made


def _overdue(timeout: timedelta = LONG, remedy: str = "") -> Overdue:
    # Its thread looks too seldom to be seen.
    return Overdue(timeout, "rank 1", remedy, end=lambda text: None)


def test_what_waits_longest_is_named_with_its_way_and_its_remedy(marks: list[Mark]) -> None:
    overdue = _overdue(remedy=", or try nccl")
    with overdue.watching("edge backward 2→1", "rank 2", CUDA):
        pass
    with overdue.watching(EDGE, "rank 0", CUDA):
        pass
    begin = time.monotonic()
    assert overdue.said(begin + 3599) is None
    marks[0].is_over = True
    said = overdue.said(begin + 3700)
    assert said is not None and said.startswith(f"rank 1 has waited 3700 s for rank 0 on {EDGE}, ")
    assert "the timeout of 1:00:00 allows" in said and said.endswith("so long, or try nccl")
    marks[1].is_over = True
    assert overdue.said(begin + 9999) is None


def test_what_is_behind_another_one_has_not_waited_before_it(marks: list[Mark]) -> None:
    overdue = _overdue()
    for _ in range(3):
        with overdue.watching(EDGE, "rank 0", CUDA):
            pass
    begin = time.monotonic()
    marks[0].is_over = True
    assert overdue.said(begin + 3000) is None
    assert overdue.said(begin + 6500) is None, "the first was over at 3000 only"
    assert "has waited 3601 s" in str(overdue.said(begin + 6601))
    marks[1].is_over = marks[2].is_over = True
    assert overdue.said(begin + 6602) is None
    with overdue.watching(EDGE, "rank 0", CUDA):
        pass
    assert overdue.said(time.monotonic() + 3599) is None


def test_what_fails_or_is_over_at_once_is_not_waited_for() -> None:
    overdue = _overdue()
    with overdue.watching(EDGE, "rank 0", CPU):
        assert overdue.said(time.monotonic() + 3601) is not None
    with pytest.raises(ZeroDivisionError), overdue.watching(EDGE, "rank 0", CUDA):
        1 / 0  # noqa: B018
    assert overdue.said(time.monotonic() + 9999) is None


def _transport(rank: int, folder: Path, timeout: timedelta) -> SharedMemoryTransport:
    memory = OfFile(folder, rank, 2, 2 * PIECE)
    watch = Overdue(timeout, f"rank {rank}", ", or pipeline_transport='nccl'")
    whole = SharedMemoryTransport(memory, rank, Alone(), PIECE, overdue=watch, ranks=(4, 7))
    return whole.part(0, EDGE)


def _receiving(rank: int, folder: Path, timeout: timedelta, killed: bool) -> None:
    presence.GRACE = 0.5
    found = presence_of_world(LONG) if killed else None
    if found is not None:
        found.enter(1)
    transport = _transport(rank, folder, timeout)
    sent, got = torch.full((PIECE,), 7, dtype=torch.uint8), torch.zeros(PIECE, dtype=torch.uint8)
    if rank == 0:
        transport.exchange([sent], [], 1, 1)
        while not (folder / "received").exists():
            time.sleep(0.01)
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)
        while not (folder / "said").exists() or not (folder / "said").read_text():
            time.sleep(0.01)  # is there, and sends nothing
        return
    transport.exchange([], [got], 0, 0)
    assert torch.equal(got, sent)
    os.dup2(os.open(folder / "said", os.O_CREAT | os.O_WRONLY), 2)
    (folder / "received").touch()
    transport.exchange([], [got], 0, 0)


def _files(folder: Path) -> None:
    for name, size in {"laid_out": 4 * PIECE, "signals": 4 * 64}.items():
        (folder / name).write_bytes(bytes(size))


def test_who_waits_for_one_that_does_not_send_ends_and_says_so(tmp_path: Path) -> None:
    _files(tmp_path)
    timeout = timedelta(seconds=1)
    assert run_until_ended(2, _receiving, tmp_path, timeout, False, timeout=240) == [0, 1]
    said = (tmp_path / "said").read_text()
    assert said.startswith("rank 1 has waited ") and f"s for rank 4 on {EDGE}, longer than" in said
    assert said.endswith("give a longer timeout if it may take so long, or"
                         " pipeline_transport='nccl'\n")  # fmt: skip


def test_who_waits_for_one_that_was_killed_ends_long_before(tmp_path: Path) -> None:
    _files(tmp_path)
    ends = run_until_ended(2, _receiving, tmp_path, LONG, True, timeout=240)
    assert ends == [-signal.SIGKILL, 1]
    said = (tmp_path / "said").read_text()
    assert "since it lost rank 0 (process" in said and "overdue" not in said
