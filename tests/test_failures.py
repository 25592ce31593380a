"""A job says once why it ended, with the frames that are the user's."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lightning_dhellam import failures
from lightning_dhellam.failures import Board, Watch, describe, fold, judge, was_said
from lightning_dhellam.models import preset

USERS = """
import json
from lightning_utilities.core.apply_func import apply_to_collection
from lightning_dhellam.models import preset

def look_up(batch):
    return batch["tokenz"]

def inside_libraries():
    return apply_to_collection([[1]], int, lambda _: look_up({}))

def chained():
    try:
        look_up({})
    except KeyError as error:
        raise RuntimeError("no batch") from error

def in_a_library():
    json.loads("{")
"""


@pytest.fixture
def users(tmp_path: Path) -> ModuleType:
    """A script of a user's."""
    file = tmp_path / "mine.py"
    file.write_text(USERS)
    spec = importlib.util.spec_from_file_location("mine", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _as_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(Board, "_of_this_process", None)


def _raised(users: ModuleType, name: str) -> BaseException:
    with pytest.raises(Exception) as error:
        getattr(users, name)()
    return error.value


def test_frames_of_libraries_between_the_users_are_folded(
    users: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = _raised(users, "inside_libraries")
    lines = describe(error).splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == "KeyError: 'tokenz'"
    assert sum("lightning_utilities" in line for line in lines) == 1
    (folded,) = [line for line in lines if "calls inside lightning_utilities" in line]
    assert "DHELLAM_TRACEBACK=full shows them" in folded
    after = lines[lines.index(folded) + 1 :]
    assert 'return batch["tokenz"]' in "\n".join(after)
    monkeypatch.setenv("DHELLAM_TRACEBACK", "full")
    assert "apply_func.py" in describe(error)


def test_what_the_user_has_called_last_is_shown(users: ModuleType) -> None:
    text = describe(_raised(users, "in_a_library"))
    assert 'json.loads("{")' in text and "decoder.py" in text
    assert text.endswith(
        "JSONDecodeError: Expecting property name enclosed in double quotes: line"
        " 1 column 2 (char 1)"
    )


def test_causes_come_first(users: ModuleType) -> None:
    text = describe(_raised(users, "chained"))
    assert text.index("KeyError: 'tokenz'") < text.index("direct cause") < text.index("no batch")


def test_a_mistake_needs_no_frames() -> None:
    with pytest.raises(ValueError) as error:
        preset("llama-3")
    error.value.__traceback__ = error.tb.tb_next  # without this test's own frame
    assert describe(error.value).startswith("error: unknown preset 'llama-3'; did you mean")
    assert "\n" not in describe(error.value)


def test_too_large_a_batch_is_said_with_a_remedy() -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    text = describe(OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has …"))
    assert text.startswith("out of GPU memory: CUDA out of memory. Use a smaller micro_batch_size")


def test_one_of_many_writes_first() -> None:
    board = Board.make()
    assert not board.written
    first: list[bool] = []
    threads = [threading.Thread(target=lambda: first.append(board.write("x"))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(first) == [False] * 15 + [True] and board.written


def test_a_child_finds_the_board_and_nobody_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board.make()
    monkeypatch.setenv(failures.BOARD, board.address)
    program = (
        "from lightning_dhellam.failures import Board\n"
        "board = Board.find()\nprint(board is not None and board.write('child'))"
    )
    command = [sys.executable, "-c", program]
    told = [subprocess.run(command, capture_output=True, text=True).stdout for _ in range(2)]
    assert told == ["True\n", "False\n"]
    assert Board.find() is board, "whoever has made it"
    monkeypatch.setattr(Board, "_of_this_process", None)
    monkeypatch.setenv(failures.BOARD, f"1 {board.address.split()[1]}")
    assert Board.find() is None
    monkeypatch.delenv(failures.BOARD)
    assert Board.find() is None


def test_a_second_run_of_a_script_has_a_word_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    board = Board.make()
    for _ in range(2):
        board.run += 1
        assert not board.written
        judge(KeyError("tokenz"), 1, board, None)
        judge(KeyError("tokenz"), 0, board, None)
    assert capfd.readouterr().err.count("rank 1 failed first") == 2


def test_who_fails_first_speaks(capfd: pytest.CaptureFixture[str]) -> None:
    board = Board.make()
    first, second = KeyError("tokenz"), KeyError("tokenz")
    judge(first, 1, board, None)
    judge(second, 0, board, None)
    judge(first, 1, board, None)
    assert was_said(first) and was_said(second)
    text = capfd.readouterr().err
    assert text.count("KeyError") == 1 and text.startswith("rank 1 failed first:\n")


def test_a_lost_connection_is_no_reason_where_another_rank_has_given_one(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = "[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234"
    board = Board.make()
    later = threading.Timer(0.3, lambda: board.write("rank 1"))
    later.start()
    error = RuntimeError(lost)
    judge(error, 0, board, None)
    later.join()
    assert was_said(error) and capfd.readouterr().err == ""
    monkeypatch.setattr(failures, "_GRACE", 0.2)
    judge(RuntimeError(lost), 1, Board.make(), os.getppid())
    assert capfd.readouterr().err == "", "the first rank says it"
    judge(RuntimeError(lost), 0, Board.make(), None)
    assert capfd.readouterr().err.startswith("rank 0 lost its connection to another rank")
    judge(RuntimeError(lost), 3, Board.make(), 1 if os.getppid() != 1 else 2)
    assert "was killed, and so all others end" in capfd.readouterr().err


def test_what_fails_after_a_loss_is_no_reason_and_who_is_lost_is_named(
    capfd: pytest.CaptureFixture[str],
) -> None:
    error = RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated.")
    error.__context__ = RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed")
    judge(error, 0, Board.make(), None, lambda: "rank 3 (process 7 on a), which was killed")
    said = capfd.readouterr().err
    assert said.startswith("rank 0 lost rank 3 (process 7 on a), which was killed: what")
    assert said.count("\n") == 1


def test_nothing_is_said_of_a_run_that_was_told_to_end(capfd: pytest.CaptureFixture[str]) -> None:
    board = Board.make()
    judge(KeyboardInterrupt(), 0, board, None)
    assert board.written and capfd.readouterr().err == ""


def test_a_killed_process_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    for program, code in (("import time; time.sleep(60)", -9), ("raise SystemExit(3)", 3)):
        process = subprocess.Popen([sys.executable, "-S", "-c", program])
        fine = subprocess.Popen([sys.executable, "-S", "-c", ""])
        board = Board.make()
        watch = Watch([fine, process], board)
        if code < 0:
            process.kill()
        watch.join()
        assert board.written
        text = capfd.readouterr().err
        assert text.startswith(f"rank 2 (process {process.pid}) ")
        assert ("was killed by SIGKILL" if code < 0 else "ended with exit code 3") in text


def test_python_shows_what_is_left_to_say_and_other_errors_as_ever(
    users: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    error = _raised(users, "inside_libraries")
    fold(error)
    fold(error)
    sys.excepthook(type(error), error, error.__traceback__)
    assert capfd.readouterr().err.count("KeyError") == 1
    other = ValueError("other")
    sys.excepthook(ValueError, other, None)
    assert capfd.readouterr().err == "ValueError: other\n"


def test_a_cause_that_was_never_raised_has_no_frames_to_show() -> None:
    try:
        raise RuntimeError("bad") from ValueError("cause")
    except RuntimeError as error:
        text = describe(error)
    assert "ValueError: cause" in text and text.endswith("RuntimeError: bad")


def test_a_hook_that_was_there_before_hears_of_a_failure_and_says_nothing(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    heard: list[BaseException] = []

    def loggers(kind: Any, error: BaseException, trace: Any) -> None:
        heard.append(error)
        print("said again", file=sys.stderr)

    monkeypatch.setattr(sys, "excepthook", loggers)
    failures._install()
    for said in (True, False):
        error = ValueError("wrong")
        setattr(error, failures._JUDGED, said)
        sys.excepthook(ValueError, error, None)
        assert heard.pop() is error
        output = capfd.readouterr().err
        assert "said again" not in output and ("wrong" in output) == (not said)
