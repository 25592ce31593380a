"""Files and folders that are whole or absent: refused early, built aside, then renamed."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

_MARKS = {"plan file": "plans", "profile": "timings"}
"""A field that each kind of file has, and no other kind."""
_SPELLINGS = {
    "sizes.tp": "tensor_parallel_size",
    "sizes.pp": "pipeline_parallel_size",
    "sizes.dp": "the number of data-parallel ranks",
}
"""What the user calls a field; those of `shapes` have the names of the model's configuration."""


_HERE, _EXCHANGE = -100, 2
"""AT_FDCWD and RENAME_EXCHANGE of Linux's renameat2."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the system says of a disk, a quota or a file that is full."""


class FileError(ValueError):
    """A file that cannot be used. The message says why and what to do."""


class WriteError(OSError):
    """What could not be written. The message says what, where and why, and how much is missing."""

    def __str__(self) -> str:
        return self.strerror or super().__str__()


def write_error(
    path: Any, error: OSError, written: int, needed: int | None = None, about: str = ""
) -> WriteError:
    """What to raise when a file could not be written to its end.

    Args:
        path: of the file.
        error: that writing has met.
        written: bytes of it that were.
        needed: bytes that it takes, if that is known.
        about: "about " if `needed` is an estimate.
    """
    text = f"{path.name} in {path.parent}: {error.strerror or error}"
    if error.errno in _FULL:
        more = (
            "" if needed is None else f", {about}{size_in_words(needed - written)} more are needed"
        )
        text += f": {size_in_words(written)} were written{more}"
        if isinstance(path, Path):
            free = shutil.disk_usage(_existing(path.parent)).free
            text += f", and {size_in_words(free)} are free"
    return WriteError(error.errno, text)


def in_parts(file: FileIO, data: memoryview) -> Iterator[int]:
    """Write all of `data` to an unbuffered file, of which a disk that is almost full takes a part.

    Gives the bytes of each part once they are written.
    """
    while data.nbytes:
        done = file.write(data)
        yield done
        data = data[done:]


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if place.exists())


def size_in_words(count: int) -> str:
    """Bytes as people say them: `2.6 kB`."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} bytes"


def local_path(path: str | os.PathLike[str], given: str = "") -> Path:
    """A path on a file system of this machine, also of `file://`.

    `given` is what the user typed, if not the path itself. Raises ValueError for `s3://` and
    others, which would become a folder of that name.
    """
    spelt = os.fspath(path)
    scheme, mark, rest = spelt.partition("://")
    if not mark or not re.fullmatch(r"[A-Za-z][\w+.:-]*", scheme):
        return Path(spelt)
    if scheme in ("file", "local"):
        return Path(rest)
    raise ValueError(
        f"{given or spelt}: {scheme}:// is not a file system of this machine, and every rank writes"
        " and reads its part there: give a folder that all nodes see, and copy it when it is whole"
    )


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
    """Write a file so that a reader sees the old content or the new, never a part.

    Raises:
        WriteError: there is no room for it, or the disk fails.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.partial-")
    try:
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise write_error(path, error, os.path.getsize(name), len(content)) from error
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
    except OSError as error:
        if isinstance(error, WriteError) or error.errno not in _FULL:
            raise
        written = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
        raise write_error(target, error, written) from error
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

    Of a link, only the link is replaced. Where the system can exchange two names, one of the two is
    there at every moment, whenever this process is killed: Linux can, on most file systems.
    """
    if not os.path.lexists(target):
        partial.rename(target)
        return
    if _exchange(partial, target):
        if partial.is_dir() and not partial.is_symlink():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink()
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


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths change names in one step. Whether this system and file system can do that."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = os.fsencode(one.absolute()), os.fsencode(other.absolute())
    if rename(_HERE, names[0], _HERE, names[1], _EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(error, os.strerror(error), str(other))


def sync_files(folder: Path) -> None:
    """Bring every file of `folder` to the disk."""
    # A rename can reach the disk before the data does; then a power cut leaves empty files.
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                try:
                    os.fsync(file.fileno())
                except OSError as error:  # where the space is only looked for now
                    size = path.stat().st_size
                    raise write_error(path, error, size) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def save_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    save_bytes(path, text.encode())


def save_bytes(path: Path, data: bytes) -> None:
    """Write beside `path`, whose folder is made, and rename, so that nobody sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)


def read_json(path: Any, kind: str, remedy: str) -> dict[str, Any]:
    """The fields of a JSON file.

    Args:
        path: of the file, of this machine or another.
        kind: what it is wanted as, such as "profile".
        remedy: what to do if it is broken.

    Raises:
        FileError: it is absent or broken, or holds no mapping.
    """
    try:
        fields = json.loads(path.read_bytes())
    except OSError as error:
        raise FileError(f"{path} cannot be read as a {kind}: {error.strerror}") from error
    except ValueError as error:
        raise FileError(f"{path} is not a whole {kind} ({error}): {remedy}") from error
    if not isinstance(fields, dict):
        shown = type(fields).__name__
        raise FileError(f"{path} holds a {shown}, and is not a {kind}: {remedy}")
    return fields


def load_json(path: Path, kind: str, version: int, *older: int) -> dict[str, Any]:
    """The fields of a JSON file that says `"format": version`, or one of the `older` formats.

    Raises:
        FileError: it is absent, broken, not a `kind` ("plan file", "profile"), or of another
            format.
    """
    fields = read_json(path, kind, "make it again")
    if "format" not in fields:
        raise FileError(f"{path} is not a {kind}: it has no field 'format'")
    for other, mark in _MARKS.items():
        if other != kind and mark in fields:
            raise FileError(
                f"{path} is a {other}, but a {kind} is wanted: a search writes both, profile.json"
                " and plan.json"
            )
    if fields["format"] not in (version, *older):
        known = " or ".join(map(str, sorted((version, *older))))
        raise FileError(
            f"{path} has format {fields['format']} and this version reads {known}: make it again"
        )
    return fields


def put_in_lines(fields: Mapping[str, Any], flat: tuple[str, ...] = ()) -> str:
    """JSON, indented; the entries of the lists named in `flat` take one line each."""
    parts = []
    for name, value in fields.items():
        if name in flat:
            rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
            text = f"[\n{rows}\n  ]" if value else "[]"
        else:
            text = json.dumps(value, indent=2).replace("\n", "\n  ")
        parts.append(f"  {json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """Each differing field with both values, in the user's spelling where there is one."""
    return list(_differences(found, expected, ""))


def _differences(found: Mapping[str, Any], expected: Mapping[str, Any], at: str) -> Iterator[str]:
    for name in dict.fromkeys([*found, *expected]):
        mine, yours = found.get(name), expected.get(name)
        if isinstance(mine, Mapping) and isinstance(yours, Mapping):
            yield from _differences(mine, yours, f"{at}{name}.")
        elif mine != yours:
            yield f"{_spelt(at + name)} is {_shown(mine)} in the file and {_shown(yours)} here"


def _spelt(name: str) -> str:
    return _SPELLINGS.get(name, name.removeprefix("shapes."))


def _shown(value: Any) -> str:
    return "absent" if value is None else repr(value)
