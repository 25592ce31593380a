"""The files of a checkpoint that torch writes: what may lie in them, and reading them safely.

Unpickling can call any function. So files are read by torch's `weights_only`, which makes nothing
but tensors, plain Python values and the types listed here; of anything else a file is refused, and
none of its code is run. Types of one's own are allowed with `torch.serialization.add_safe_globals`.
What could not be read again is said when it is written, by its place and its type.
"""

from __future__ import annotations

import argparse
import datetime
import decimal
import fractions
import io
import pathlib
import types
import uuid
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from pkgutil import resolve_name
from typing import IO, Any, cast
from zipfile import is_zipfile

import jsonargparse
import numpy
import torch
from torch.serialization import get_safe_globals, get_unsafe_globals_in_checkpoint, safe_globals

from lightning_dhellam.files import write_error
from lightning_dhellam.models.config import ModelConfig
from lightning_dhellam.models.lora import LoRA
from lightning_dhellam.remote import Folder

REMEDY = "use another checkpoint, such as the one before it"
_MAKERS: dict[str, Any] = {
    "multiarray.scalar": numpy.float64(0).__reduce__()[0],
    "multiarray._reconstruct": numpy.empty(0).__reduce__()[0],
}
"""What numpy pickles scalars and arrays with: in modules that have moved."""
_PATHS = (
    pathlib.PosixPath,
    pathlib.WindowsPath,
    pathlib.PurePosixPath,
    pathlib.PureWindowsPath,
)
ALLOWED: list[Any] = [
    *(frozenset, range, slice),
    *(datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone),
    *(decimal.Decimal, fractions.Fraction, uuid.UUID),
    *(types.SimpleNamespace, argparse.Namespace, jsonargparse.Namespace),
    *(
        (kind, f"{home}.{kind.__name__}")
        for kind in _PATHS
        for home in ("pathlib", "pathlib._local")
    ),
    *(numpy.ndarray, numpy.dtype),
    *(kind for name, kind in vars(numpy.dtypes).items() if name.endswith("DType")),
    *(
        (made, f"numpy.{core}.{name}")
        for name, made in _MAKERS.items()
        for core in ("core", "_core")
    ),
    LoRA,
    ModelConfig,
]
"""Types that files may hold besides those that torch allows itself: values that do nothing."""
# Lightning itself reads files of other strategies, which may have them among hyperparameters.
torch.serialization.add_safe_globals([LoRA, ModelConfig])
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Tensor, torch.dtype, torch.Size)
_MAPPINGS = (dict, OrderedDict, Counter)


def write(file: Path, content: Mapping[str, Any]) -> None:
    """Write a file that `read` reads.

    Warns of types that it reads only when they are allowed.

    Raises:
        ValueError: something in it can not be saved, or never be read.
        WriteError: there is no room for it, or the disk fails.
    """
    _save(file, _checked(file.name, content))


def encoded(name: str, content: Mapping[str, Any]) -> bytes:
    """What `write` writes into a file of that name.

    Raises:
        ValueError: as `write`.
    """
    buffer = io.BytesIO()
    torch.save(_checked(name, content), buffer)
    return buffer.getvalue()


def _checked(file: str, content: Mapping[str, Any]) -> dict[str, Any]:
    content = dict(content)
    unknown: dict[str, set[str]] = {}
    for place, value in _odd_parts(content):
        names = _unknown_types(f"{file}: {place}", value)
        if names:
            unknown[place] = names
    if unknown:
        listed = ", ".join(f"{place} ({', '.join(sorted(unknown[place]))})" for place in unknown)
        warnings.warn(
            f"the checkpoint holds types that are read only when you allow them: {listed}; before"
            f" loading it {_allow(set().union(*unknown.values()))}, or keep plain values instead",
            stacklevel=3,
        )
    return content


def check_readable(content: Mapping[str, Any], place: str = "", file: str = "") -> None:
    """Refuse what `write` would refuse, before there is anything to lose.

    Args:
        content: what is to be in a checkpoint.
        place: what it is called there.
        file: that it is to be in, if that is known.

    Raises:
        ValueError: something in it can not be saved, or never be read.
    """
    for inner, value in _odd_parts(dict(content), place):
        _unknown_types(f"{file}: {inner}" if file else inner, value)


class _Stream:
    """What torch writes to: of a disk's error torch makes one about positions."""

    def __init__(self, file: IO[bytes] | None) -> None:
        self.file = file
        self.name = "" if file is None else file.name
        self.size = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        if self.file is not None:
            self._try(lambda file: file.write(data))
        self.size += memoryview(data).nbytes
        return memoryview(data).nbytes

    def flush(self) -> None:
        if self.file is not None:
            self._try(lambda file: file.flush())

    def _try(self, part: Callable[[IO[bytes]], object]) -> None:
        assert self.file is not None
        try:
            part(self.file)
        except OSError as error:
            self.error = self.error or error
            raise


def _save(file: Path, content: Any) -> None:
    opened = file.open("wb")
    stream = _Stream(opened)
    try:
        torch.save(content, cast(IO[bytes], stream))
        stream.flush()
    except Exception as error:
        if stream.error is None:
            raise
        whole = _Stream(None)
        torch.save(content, cast(IO[bytes], whole))
        raise write_error(file, stream.error, stream.size, whole.size) from error
    finally:
        with suppress(OSError):  # what it still holds finds no room either
            opened.close()


_BEGINNING = b"PK"
"""What a file of `torch.save` begins with: it is a zip file."""


def read(file: Folder, *, mapped: bool = False) -> dict[str, Any]:
    """The content of a file, of whatever device on the CPU; none of its code is run.

    With `mapped` it is a file that the user has named, whose tensors stay there until they are
    read, and must not be changed.

    Raises:
        ValueError: it is missing or damaged, or holds a type that is not allowed.
    """
    if not file.is_file():
        raise ValueError(f"checkpoint {file.parent} has no {file.name}: {REMEDY}")
    source: Any = file if isinstance(file, Path) else io.BytesIO(file.read_bytes())
    try:
        with file.open("rb") if source is file else nullcontext(source) as stream:
            # Of a file that is cut off torch says something else for each length.
            whole = is_zipfile(stream)
            stream.seek(0)
            begins = stream.read(len(_BEGINNING)) == _BEGINNING
        if mapped and not begins:
            raise ValueError(
                f"{file} is no checkpoint: give a folder that a run with DHellamStrategy has saved,"
                " or a file that one with another of Lightning's strategies has"
            )
        if not whole:
            raise ValueError(
                f"{file} is damaged, or cut off at {file.stat().st_size} bytes: {REMEDY}"
            )
        with _allowed():
            try:
                content = torch.load(
                    _begun(source),
                    map_location="cpu",
                    weights_only=True,
                    mmap=mapped and source is file,
                )
            except Exception as error:
                # Torch names the first type only. Most files have none: they are walked once.
                if not (unknown := _unknown_in(source)):
                    raise
                raise ValueError(
                    f"{file} holds {', '.join(sorted(unknown))}, which could run code when it is"
                    f" loaded: use another checkpoint, or if you trust this one, {_allow(unknown)}"
                ) from error
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"{file} cannot be read ({type(error).__name__}: {_reason(error)}): if it is damaged,"
            f" {REMEDY}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a mapping: {REMEDY}")
    return content


def _unknown_in(source: Any) -> set[str]:
    """Names of the types in a file that are not allowed; none if that cannot be told either."""
    with suppress(Exception):
        return set(get_unsafe_globals_in_checkpoint(_begun(source)))
    return set()


def _begun(source: Any) -> Any:
    """A path, or a stream at its beginning."""
    if isinstance(source, io.BytesIO):
        source.seek(0)
    return source


def _reason(error: Exception) -> str:
    text = str(error).partition("WeightsUnpickler error: ")
    return (text[2] or text[0]).strip().partition("\n")[0].partition(". ")[0]


def _allow(names: set[str]) -> str:
    return f"call torch.serialization.add_safe_globals([{', '.join(sorted(names))}])"


@contextmanager
def _allowed() -> Iterator[None]:
    # Leaving it takes all of these away, also what the user has allowed as well.
    known = set(get_safe_globals())
    with safe_globals([kind for kind in ALLOWED if kind not in known]):
        yield


def _odd_parts(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Each part that is no plain value, with the keys that lead to it."""
    kind = type(value)
    if kind in _MAPPINGS:
        for key, part in value.items():
            if type(key) not in _PLAIN:
                yield f"{place}.{key!r}".lstrip("."), key
            yield from _odd_parts(part, f"{place}.{key}".lstrip("."))
    elif kind in (list, tuple):
        for index, part in enumerate(value):
            yield from _odd_parts(part, f"{place}[{index}]")
    elif kind not in _PLAIN:
        yield place, value


def _unknown_types(place: str, value: Any) -> set[str]:
    """Names of the types of a value that must be allowed before it can be read.

    Raises:
        ValueError: it can not be saved, or not be read even then.
    """
    kind = f"a {type(value).__module__}.{type(value).__qualname__}"
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
    except Exception as error:
        raise ValueError(
            f"{place} is {kind}, which cannot be saved ({_reason(error)}): keep it out of the state"
            " and of the hyperparameters (save_hyperparameters(ignore=...))"
        ) from error
    buffer.seek(0)
    with _allowed():
        unknown = set(get_unsafe_globals_in_checkpoint(buffer))
        buffer.seek(0)
        try:
            # As it will be read when the user allows them: a defaultdict cannot be even then.
            with safe_globals([(resolve_name(name), name) for name in unknown]):
                torch.load(buffer, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{place} is {kind}, which cannot be read again ({_reason(error)}): keep a dict, a"
                " list or numbers instead"
            ) from error
    return unknown
