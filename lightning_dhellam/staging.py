"""Nothing half-written: refuse early, build aside, then rename."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_folder(folder: Path, given: str) -> None:
    """Refuse a folder that cannot be made or written to, before there is anything to write.

    `given` is what the user typed: `--output runs/search`. Raises ValueError.
    """
    found = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not found.is_dir():
        raise ValueError(
            f"{given}: {found} is not a folder, and one is needed there: give another path"
        )
    if not os.access(found, os.W_OK | os.X_OK):
        raise ValueError(f"{given}: {found} cannot be written to: give another path")


def check_file(file: Path, given: str) -> None:
    """Refuse a file that cannot be written, as `check_folder` does a folder."""
    if file.is_dir():
        raise ValueError(f"{given} is a folder, and a file is written: give the path of a file")
    check_folder(file.parent, given)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.partial-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def staged_directory(target: Path, replace: bool = False) -> Iterator[Path]:
    """A temporary sibling of `target` that takes its name when the block ends without error.

    On an error the sibling is removed and `target` is untouched. If `target` exists by the end
    (another process was first) it stays and the sibling is removed, unless `replace` is set.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.partial-"))
    try:
        yield partial
        partial.chmod(0o777 & ~_umask())
        sync_files(partial)
        if replace:
            put_in_place(partial, target)
        else:
            _claim(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _claim(partial: Path, target: Path) -> None:
    try:
        partial.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def put_in_place(partial: Path, target: Path) -> None:
    """Give `partial` the name `target`. What had it is gone then, or has it again on an error.

    Of a link, only the link is replaced.
    """
    if not os.path.lexists(target):
        partial.rename(target)
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old-"))
    kept = old / target.name
    try:
        target.rename(kept)
        partial.rename(target)
    except BaseException:
        if os.path.lexists(kept):
            kept.rename(target)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def sync_files(folder: Path) -> None:
    """Bring every file of `folder` to the disk."""
    # A rename can reach the disk before the data does; then a power cut leaves empty files.
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
