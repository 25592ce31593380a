"""A corpus: where text comes from, and the documents in it, always in the same order."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

STDLIB = "stdlib"
"""Source name of the Python standard library's own source text."""

JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
PARQUET_SUFFIX = ".parquet"
COMPRESSED_SUFFIX = ".gz"
"""May stand behind the suffix of any text or JSONL file."""

_PROSE = {".txt", ".text", ".md", ".rst", ".tex", ".org", ".html"}
_CODE = {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java"}
_CODE |= {".js", ".ts", ".rb", ".sh", ".sql", ".css", ".toml", ".yaml", ".yml"}
TEXT_SUFFIXES = frozenset(_PROSE | _CODE)
_KNOWN = TEXT_SUFFIXES | JSONL_SUFFIXES | {PARQUET_SUFFIX}
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NOT_LIBRARY = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)


class Document(NamedTuple):
    """One text, and about how many bytes of the source's files it came from."""

    text: str
    source_bytes: int


class File(NamedTuple):
    """A file of a source, and its name among that source's files."""

    path: Path
    name: str

    @property
    def suffix(self) -> str:
        """What kind of file it is, whether compressed or not."""
        stem = self.path.name.removesuffix(COMPRESSED_SUFFIX)
        return Path(stem).suffix

    @property
    def is_jsonl(self) -> bool:
        # In a folder, .json is some tool's configuration; a file named by the user is their data.
        is_named = self.name == "."
        return self.suffix in JSONL_SUFFIXES or (is_named and self.suffix == ".json")

    @property
    def is_parquet(self) -> bool:
        return self.path.suffix == PARQUET_SUFFIX


@dataclass(frozen=True)
class Corpus:
    """Files that hold documents: a text file is one, and so is a JSONL line or a Parquet row.

    Attributes:
        sources: as the user gave them.
        roots: the file or folder of each.
        files: of all of them, in order.
        json_key: key of a JSONL line, or column of a Parquet file, that holds the text.
    """

    sources: tuple[str, ...]
    roots: tuple[Path, ...]
    files: tuple[File, ...]
    json_key: str

    def __str__(self) -> str:
        return ", ".join(self.sources)

    @property
    def size(self) -> int:
        """Size of all files, in bytes."""
        return sum(_stat(file.path).st_size for file in self.files)

    @property
    def has_keys(self) -> bool:
        """Whether `json_key` matters."""
        return any(file.is_jsonl or file.is_parquet for file in self.files)

    def digest(self) -> str:
        """A hash of every file's relative path, size and modification time."""
        state = hashlib.sha256()
        for file in self.files:
            stat = _stat(file.path)
            state.update(f"{file.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return state.hexdigest()

    def documents(self) -> Iterator[Document]:
        """Yield the documents that hold any text.

        Raises ValueError for a file that cannot be read or is not UTF-8, a bad JSONL line, and
        when the whole corpus holds no text.
        """
        found = False
        for file in self.files:
            if file.is_parquet:
                documents = _parquet_documents(file.path, self.json_key)
            elif file.is_jsonl:
                documents = _jsonl_documents(file.path, self.json_key)
            else:
                documents = _text_document(file.path)
            for document in documents:
                if document.text:
                    found = True
                    yield document
        if not found:
            raise ValueError(
                f"source={self} holds no text: {len(self.files)} file(s) were read and every"
                " document is empty. Give a source with text in it."
            )


def open_corpus(sources: str | Path | Sequence[str | Path], json_key: str = "text") -> Corpus:
    """Find the files of one source or several, in a fixed order, without reading them.

    A source is a text file, a JSONL file, either of them compressed (`.gz`), a Parquet file, a
    folder (searched recursively; hidden names are skipped), or `stdlib` (a folder of that name is
    spelled `./stdlib`).

    Raises ValueError when a source does not exist, is empty, was given twice, or has no file of a
    known kind.
    """
    given = [sources] if isinstance(sources, str | Path) else list(sources)
    if not given:
        raise ValueError("source=[] is empty. Give at least one file, folder, or `stdlib`.")
    opened = [_open_source(str(source)) for source in given]
    roots = tuple(root for root, _ in opened)
    for source, root in zip(given, roots, strict=True):
        if roots.count(root) > 1:
            raise ValueError(f"source={source} is given twice, and would count twice. Give it once")
    files = tuple(file for _, found in opened for file in found)
    return Corpus(tuple(map(str, given)), roots, files, json_key)


def _open_source(source: str) -> tuple[Path, list[File]]:
    """The file or folder that a source names, and its files."""
    if source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = _library_files(root)
        rule = f"no .py file was found under {root}. Give a text file or a folder."
    else:
        root = Path(source).absolute()
        if not root.exists():
            raise ValueError(
                f"source={source} does not exist. Give a text file, a JSONL file, a folder, or"
                f" `{STDLIB}` for the source text of Python's standard library."
            )
        paths = _folder_files(root) if root.is_dir() else (root,)
        rule = (
            f"the folder has no file with a known suffix ({' '.join(sorted(_KNOWN))}, or"
            f" {COMPRESSED_SUFFIX} behind one). Add or rename files."
        )
    if not paths:
        raise ValueError(f"source={source} is empty: {rule}")
    if not sum(_stat(path).st_size for path in paths):
        raise ValueError(
            f"source={source} is empty: its {len(paths)} file(s) have 0 bytes."
            " Give a source with text in it."
        )
    return root, [File(path, os.path.relpath(path, root)) for path in paths]


def _folder_files(root: Path) -> tuple[Path, ...]:
    found = []
    for folder, subfolders, names in os.walk(root, onerror=_refuse_folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and File(path, name).suffix in _KNOWN:
                found.append(path)
    return tuple(sorted(found, key=lambda path: path.relative_to(root).as_posix()))


def _library_files(root: Path) -> tuple[Path, ...]:
    return tuple(
        path
        for path in _folder_files(root)
        if path.suffix == ".py" and not _NOT_LIBRARY & set(path.relative_to(root).parts)
    )


def _refuse_folder(error: OSError) -> None:
    raise ValueError(_unreadable(error.filename, error)) from error


def _unreadable(path: Path | str, error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{path} cannot be read ({error.strerror}). Fix its permissions or leave it out."
    reason = str(error).partition("\n")[0]
    return f"{path} cannot be read ({reason}). If it is damaged, get it again, or leave it out."


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise ValueError(_unreadable(path, error)) from error


def _decode(raw: bytes, path: Path, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{raw[error.start]:02x} at offset {offset + error.start}"
            f" ({error.reason}). Convert the file to UTF-8 or leave it out."
        ) from error


def _text_document(path: Path) -> Iterator[Document]:
    with _opened(path) as (stream, file):
        raw = stream.read()
        mark = len(_BYTE_ORDER_MARK) if raw.startswith(_BYTE_ORDER_MARK) else 0
        yield Document(_decode(raw[mark:], path, mark), file.tell())


def _jsonl_documents(path: Path, json_key: str) -> Iterator[Document]:
    with _opened(path) as (stream, file):
        offset = done = 0
        for number, raw in enumerate(stream, start=1):
            mark = len(_BYTE_ORDER_MARK) if offset == 0 and raw[:3] == _BYTE_ORDER_MARK else 0
            line = _decode(raw[mark:], path, offset + mark)
            offset += len(raw)
            if line.strip():
                size, done = file.tell() - done, file.tell()
                yield Document(_json_text(line, json_key, f"{path}:{number}"), size)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """What a file holds, and the file itself, whose position tells how much of it was read."""
    try:
        with path.open("rb") as file:
            if path.suffix == COMPRESSED_SUFFIX:
                yield io.BufferedReader(gzip.GzipFile(fileobj=file)), file
            else:
                yield file, file
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(_unreadable(path, error)) from error


def _parquet_documents(path: Path, json_key: str) -> Iterator[Document]:
    try:
        from pyarrow import ArrowException, ArrowInvalid
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(
            f"{path} is a Parquet file, which needs pyarrow: pip install 'lightning-dhellam[data]'"
        ) from error
    try:
        with ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if json_key not in columns:
                raise ValueError(
                    f"{path} has no column {json_key!r}; its columns are {sorted(columns)}."
                    " Name the column that holds the text with --json_key."
                )
            size = _stat(path).st_size // max(1, file.metadata.num_rows)
            number = 0
            for batch in file.iter_batches(columns=[json_key]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield Document(_string(text, json_key, f"{path}: row {number}"), size)
    except (ArrowInvalid, ArrowException, OSError) as error:
        raise ValueError(_unreadable(path, error)) from error


def _json_text(line: str, json_key: str, where: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{where} is not JSON: {error.msg} at column {error.colno}."
            " Every line must be one JSON object."
        ) from error
    if not isinstance(value, dict):
        raise ValueError(f"{where} is a JSON {type(value).__name__}; each line must be an object.")
    if json_key not in value:
        raise ValueError(
            f"{where} has no key {json_key!r}; its keys are {sorted(value)}."
            " Name the key that holds the text with --json_key."
        )
    return _string(value[json_key], json_key, where)


def _string(text: object, json_key: str, where: str) -> str:
    if not isinstance(text, str):
        raise ValueError(
            f"{where} has {json_key}={text!r:.60}, which is not a string."
            " Name the key that holds the text with --json_key."
        )
    return _without_lone_surrogates(text, where)


def _without_lone_surrogates(text: str, where: str) -> str:
    # JSON may escape half of a surrogate pair; such a string has no UTF-8 form.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where} holds a lone surrogate \\u{ord(text[error.start]):04x} at character"
            f" {error.start}, which UTF-8 cannot express. Remove it from the text."
        ) from error
    return text
