"""Whenever a process is killed, what it was saving or removing is whole, old or new."""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch

from lightning_dhellam import checkpoint, files, leftovers
from lightning_dhellam.checkpoint.folder import check_whole, load_common
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.strategy.keeping import link
from tests.checkpoint.kills import Events, draw, goes_on, train

ALONE = ParallelContext.single(torch.device("cpu"))
WORLD, KILLS = 2, 3


def _save(path: Path, value: int) -> None:
    checkpoint.save(path, ALONE, {"value": value}, {"w": torch.full((4,), float(value))}, {})


def _value(path: Path) -> int:
    check_whole(path, ALONE)
    return int(load_common(path)["value"])


def _killed(folder: Path, part: Callable[[], None], event: int) -> bool:
    """Do `part` in a process that is killed at an event; whether there was such an event."""
    process = os.fork()
    if not process:
        code = 1
        try:
            Events(folder, event)
            part()
            code = 0
        except BaseException:  # which would look like the end of all events
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def _events(tmp_path: Path, part: Callable[[Path], None], look: Callable[[Path], None]) -> int:
    """Kill `part` at each of its events, each time in a new folder; how many there are."""
    count = 0
    while True:
        folder = tmp_path / f"{count}"
        folder.mkdir()
        _save(folder / "a.ckpt", 1)
        if not _killed(folder, lambda folder=folder: part(folder), count):  # type: ignore[misc]
            return count
        look(folder)
        shutil.rmtree(folder)
        count += 1


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_save_that_is_killed_leaves_the_old_one_or_the_new(
    tmp_path: Path, exchanges: bool
) -> None:
    found: list[int] = []

    def look(folder: Path) -> None:
        if exchanges:
            found.append(_value(folder / "a.ckpt"))
        leftovers.restore(folder)
        found.append(_value(folder / "a.ckpt"))
        _save(folder / "a.ckpt", 3)
        assert [path.name for path in folder.iterdir()] == ["a.ckpt"]

    exchange = files._exchange if exchanges else lambda one, other: False
    with mock.patch.object(files, "_exchange", exchange):
        count = _events(tmp_path, lambda folder: _save(folder / "a.ckpt", 2), look)
    assert count > 10 and {*found} == {1, 2}


def test_a_removal_that_is_killed_leaves_all_or_nothing(tmp_path: Path) -> None:
    found: list[bool] = []

    def look(folder: Path) -> None:
        found.append((folder / "a.ckpt").exists())
        assert not found[-1] or _value(folder / "a.ckpt") == 1
        leftovers.clear(folder)
        assert len([*folder.iterdir()]) == found[-1]

    count = _events(tmp_path, lambda folder: leftovers.remove(folder / "a.ckpt"), look)
    assert count > 5 and {*found} == {True, False}


def test_a_link_that_is_killed_names_the_old_one_or_the_new(tmp_path: Path) -> None:
    found: list[int] = []

    def part(folder: Path) -> None:
        link(folder / "b.ckpt", folder / "last.ckpt")

    def look(folder: Path) -> None:
        found.append(_value(folder / "last.ckpt"))
        part(folder)
        assert _value(folder / "last.ckpt") == 2

    def prepared(folder: Path) -> None:
        part(folder)

    with mock.patch.object(sys.modules[__name__], "_save", _save_both):
        assert _events(tmp_path, prepared, look) >= 2
    assert {*found} == {1, 2}


def _save_both(path: Path, value: int, save: Callable[[Path, int], None] = _save) -> None:
    """A checkpoint that `last.ckpt` names, and one that is to have that name."""
    save(path, value)
    save(path.with_name("b.ckpt"), value + 1)
    path.with_name("last.ckpt").symlink_to(path.name)


def test_a_job_of_which_a_rank_is_killed_goes_on_bitwise(tmp_path: Path) -> None:
    sizes = {"tensor_parallel_size": 2, "async_checkpoint": True}
    never, counts = train(WORLD, sizes, tmp_path / "never")
    generator = random.Random(1)
    for number in range(KILLS):
        kill = draw(generator, counts)
        assert not goes_on(WORLD, sizes, tmp_path / f"{number}", kill, never), kill
