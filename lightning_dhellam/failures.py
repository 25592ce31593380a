"""How a job says why it ended: once, by the rank that failed first, with the user's own frames.

When a rank fails, the others lose it in the middle of a collective, and fail as well. Ranks that
one process has started share a board, a file in memory that goes with them: who writes on it first
speaks, and the others end without a word. A rank that was killed cannot speak, so that the one that
has started it does, or, if that is the one, any other.

    rank 1   KeyError | writes, speaks
    rank 0            | loses rank 1 | finds that rank 1 wrote first, ends
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stderr, suppress
from pathlib import Path
from types import TracebackType
from typing import ClassVar

BOARD = "DHELLAM_BOARD"
"""Environment variable with the process that has the board open, and its number there."""
FULL = "DHELLAM_TRACEBACK"
"""Environment variable that shows all frames of a traceback if it is `full`."""
_JUDGED = "_dhellam_judged"
_GRACE = 4.0
"""Seconds that a rank which has lost another waits for what is said about it."""
_LOST = ("gloo", "Connection closed", "Connection reset", "Broken pipe", "NCCL", "ncclRemote")
_HERE = Path(__file__).resolve().parent
_OURS = (_HERE, *(_HERE.parent / name for name in ("kernels", "search", "recipes")))


class Board:
    """Where the ranks of a node that one process has started agree on who speaks.

    Args:
        file: open for reading and appending.

    Attributes:
        run: number of the run that it is about, the same on all ranks: a script may have several.
    """

    _of_this_process: ClassVar[Board | None] = None

    def __init__(self, file: int) -> None:
        self._file = file
        self.run = 0

    @classmethod
    def make(cls) -> Board:
        """A new one, which goes with this process."""
        cls._of_this_process = cls(os.memfd_create("dhellam-failures"))
        return cls._of_this_process

    @property
    def address(self) -> str:
        """What `BOARD` says to the processes that are to find it."""
        return f"{os.getpid()} {self._file}"

    @classmethod
    def find(cls) -> Board | None:
        """The board of the process that has started the ranks, this one or its parent, if any."""
        owner, _, number = os.environ.get(BOARD, "").partition(" ")
        if cls._of_this_process is None and owner == str(os.getppid()):
            with suppress(OSError):
                file = os.open(f"/proc/{owner}/fd/{number}", os.O_RDWR)
                cls._of_this_process = cls(file)
        return cls._of_this_process

    def write(self, who: str) -> bool:
        """Write, and tell whether nobody has before in this run."""
        author = f"{os.getpid()}-{threading.get_ident()}-{time.monotonic_ns()}"
        mark = f"{self.run}: {who} by {author}"
        file = os.open(f"/proc/self/fd/{self._file}", os.O_RDWR | os.O_APPEND)
        try:
            os.write(file, f"{mark}\n".encode())
        finally:
            os.close(file)
        return self._marks[0] == mark

    @property
    def written(self) -> bool:
        """Whether anybody has in this run."""
        return bool(self._marks)

    @property
    def _marks(self) -> list[str]:
        text = os.pread(self._file, os.fstat(self._file).st_size, 0).decode()
        return [line for line in text.splitlines() if line.startswith(f"{self.run}: ")]


class Watch:
    """Says which of the processes that this one has started was killed, if one was.

    Args:
        processes: by rank, from 1 on.
        board: of theirs.
    """

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]], board: Board) -> None:
        self._left = dict(enumerate(processes, start=1))
        self._board = board
        self._thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait until all have ended."""
        self._thread.join()

    def _run(self) -> None:
        while self._left:
            for rank, process in list(self._left.items()):
                code = process.poll()
                if code is not None:
                    del self._left[rank]
                    if code and self._board.write(f"the end of rank {rank}"):
                        _say(_ended(rank, process.pid, code))
            time.sleep(0.2)


def _ended(rank: int, process: int, code: int) -> str:
    who = f"rank {rank} (process {process})"
    if code > 0:
        return f"{who} ended with exit code {code}, and so all others do: what it said is above"
    name = signal.Signals(-code).name if -code in list(signal.Signals) else f"signal {-code}"
    why = ""
    if -code == signal.SIGKILL:
        why = ": by hand, or by the system because memory ran out (dmesg says so)"
    return f"{who} was killed by {name}, and so all others end{why}"


def judge(
    error: BaseException,
    rank: int,
    board: Board | None,
    parent: int | None,
    lost: Callable[[], str | None] = lambda: None,
) -> None:
    """Say why this rank of several fails if no other has, and let Python say nothing more.

    Args:
        error: that ends this rank.
        rank: of this process.
        board: of the ranks of this node; None where something else has started them.
        parent: process that has started this one as a rank, if one has.
        lost: which other rank is gone, in words, as far as that is known by now.
    """
    if getattr(error, _JUDGED, None) is not None:
        return
    if not isinstance(error, Exception) or type(error).__name__ == "SIGTERMException":
        if board is not None:
            board.write(f"the end of rank {rank}")  # nothing is wrong with it
        return
    # Whoever has lost a rank may fail once more while it ends: by loaders that are told to, say.
    loss = next((one for one, _ in _chain(error) if is_lost(one)), None)
    if loss is not None:
        text = _lost(loss, rank, board, parent, lost)
    elif board is None or board.write(f"rank {rank}"):
        text = f"rank {rank} failed{' first' if board is not None else ''}:\n{describe(error)}"
    else:
        text = None
    if text:
        _say(text)
    _mark(error, said=True)


def fold(error: BaseException) -> None:
    """Let Python show an error, if nobody catches it, as `describe` does."""
    if isinstance(error, Exception) and getattr(error, _JUDGED, None) is None:
        _mark(error, said=False)


def _mark(error: BaseException, *, said: bool) -> None:
    _install()
    with suppress(AttributeError, TypeError):
        setattr(error, _JUDGED, said)


def was_said(error: BaseException) -> bool:
    """Whether there is nothing left to say about an error: this rank has, or another one."""
    return getattr(error, _JUDGED, None) is True


def is_lost(error: BaseException) -> bool:
    """Whether an error only says that another rank is no longer there."""
    module = type(error).__module__
    if module.startswith("torch.distributed") and "checkpoint" not in module:  # that is of files
        return True
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return True
    return type(error) is RuntimeError and any(sign in str(error) for sign in _LOST)


def _lost(
    error: BaseException,
    rank: int,
    board: Board | None,
    parent: int | None,
    lost: Callable[[], str | None],
) -> str | None:
    """What is left to say when another rank is lost: its own message comes first."""
    reason = str(error).partition("\n")[0]
    end = time.monotonic() + _GRACE
    while board is not None and time.monotonic() < end:
        if board.written:
            return None
        if parent is not None and os.getppid() != parent:
            if not board.write(f"rank {rank}"):
                return None
            return (
                f"rank 0 (process {parent}) was killed, and so all others end: it has started"
                " them, and ended without a word"
            )
        time.sleep(0.1)
    if board is not None and (rank or not board.write(f"rank {rank}")):
        return None
    who = lost()
    if who is not None:
        return f"rank {rank} lost {who}: what that one said is the cause ({reason})"
    return (
        f"rank {rank} lost its connection to another rank, which has failed, was killed or did not"
        f" come within the timeout; what that one said is the cause ({reason})"
    )


def describe(error: BaseException) -> str:
    """The traceback of an error, in which the frames of libraries between the user's are folded.

    A mistake that this package names, where no frame is the user's, needs none.
    """
    if os.environ.get(FULL) == "full":
        return "".join(traceback.format_exception(error)).rstrip()
    if type(error).__name__ == "OutOfMemoryError":
        return (
            f"out of GPU memory: {str(error).partition('. ')[0]}. Use a smaller micro_batch_size,"
            " shorter sequences or more ranks per model (tensor_parallel_size)"
        )
    parts: list[str] = []
    for one, link in _chain(error):
        frames = traceback.extract_tb(one.__traceback__)
        yours = [is_yours(frame.filename) for frame in frames]
        last = "".join(traceback.format_exception_only(one)).rstrip()
        ours = bool(frames) and is_ours(frames[-1].filename)
        if ours and isinstance(one, ValueError) and not any(yours):
            parts.append(f"error: {' '.join(str(one).split())}")
            continue
        parts.append(
            "\n".join(["Traceback (most recent call last):", *_folded(frames, yours), last])
        )
        if link:
            parts.append(link)
    return "\n\n".join(parts)


def _chain(error: BaseException) -> list[tuple[BaseException, str]]:
    """An error after those that it came from, each with what stands between it and the next."""
    found: list[tuple[BaseException, str]] = [(error, "")]
    while True:
        cause, context = error.__cause__, error.__context__
        if cause is not None:
            error, link = cause, traceback._cause_message.strip()  # type: ignore[attr-defined]
        elif context is not None and not error.__suppress_context__:
            error, link = context, traceback._context_message.strip()  # type: ignore[attr-defined]
        else:
            return found
        if any(error is one for one, _ in found):
            return found
        found.insert(0, (error, link))


def _folded(frames: Sequence[traceback.FrameSummary], yours: Sequence[bool]) -> Iterable[str]:
    if not any(yours):
        yield from (line.rstrip() for line in traceback.format_list(list(frames)))
        return
    hidden: list[str] = []
    for frame, own in zip(frames, yours, strict=True):
        if own:
            yield from _count(hidden)
            hidden.clear()
            yield traceback.format_list([frame])[0].rstrip()
        else:
            hidden.append(frame.filename)
    # What the user has called last may say by its own lines what is wrong.
    if len(hidden) > 3:
        yield from _count(hidden[:-1])
        hidden = hidden[-1:]
    if hidden:
        tail = list(frames)[-len(hidden) :]
        yield from (line.rstrip() for line in traceback.format_list(tail))


def _count(files: Sequence[str]) -> Iterable[str]:
    if files:
        names = dict.fromkeys(_package(file) for file in files)
        calls = "call" if len(files) == 1 else "calls"
        yield f"  ({len(files)} {calls} inside {', '.join(names)}; {FULL}=full shows them)"


def _package(file: str) -> str:
    if is_ours(file):
        return "lightning_dhellam"
    parts = Path(file).parts
    for folder in ("site-packages", "dist-packages"):
        if folder in parts:
            return Path(parts[parts.index(folder) + 1]).stem
    return "Python"


def is_ours(file: str) -> bool:
    """Whether a source file is of this package."""
    path = Path(file).resolve()
    return any(map(path.is_relative_to, _OURS))


def is_yours(file: str) -> bool:
    """Whether a source file is the user's: neither of this package nor of an installed one."""
    if file.startswith("<frozen") or is_ours(file):
        return False
    path = Path(file)
    if {"site-packages", "dist-packages"} & set(path.parts):
        return False
    library = Path(os.__file__).parent
    commands = Path(sys.prefix) / "bin"
    return not any(map(path.is_relative_to, (library, library.resolve(), commands)))


def _say(text: str) -> None:
    # Not by `print`: it may be a thread that speaks, or a process whose streams are being closed.
    os.write(2, f"{text}\n".encode())


def _install() -> None:
    """Let Python say of judged errors what is left to say, and of all others what it does."""
    if getattr(sys.excepthook, _JUDGED, False):
        return
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        said = getattr(error, _JUDGED, None)
        if said is None:
            before(kind, error, trace)
            return
        if not said:
            _say(describe(error))
        with redirect_stderr(io.StringIO()):  # a logger's, say, marks the run as failed
            before(kind, error, trace)

    setattr(hook, _JUDGED, True)
    sys.excepthook = hook
