"""A corpus: where text comes from, and the documents in it, always in the same order."""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

STDLIB = "stdlib"
"""Source name of the Python standard library's own source text."""

JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
_PROSE = {".txt", ".text", ".md", ".rst", ".tex", ".org", ".html"}
_CODE = {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java"}
_CODE |= {".js", ".ts", ".rb", ".sh", ".sql", ".css", ".toml", ".yaml", ".yml"}
TEXT_SUFFIXES = frozenset(_PROSE | _CODE)
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NOT_LIBRARY = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)


class Document(NamedTuple):
    """One text, and how many bytes of the source it came from."""

    text: str
    source_bytes: int


@dataclass(frozen=True)
class Corpus:
    """Files that hold documents: a text file is one document, a JSONL line is one document."""

    source: str
    root: Path
    files: tuple[Path, ...]
    json_key: str

    @property
    def size(self) -> int:
        """Size of all files, in bytes."""
        return sum(_stat(path).st_size for path in self.files)

    @property
    def has_jsonl(self) -> bool:
        return any(_is_jsonl(path, named=path == self.root) for path in self.files)

    def digest(self) -> str:
        """A hash of every file's relative path, size and modification time."""
        state = hashlib.sha256()
        for path in self.files:
            stat = _stat(path)
            name = os.path.relpath(path, self.root)
            state.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
        return state.hexdigest()

    def documents(self) -> Iterator[Document]:
        """Yield the documents that hold any text.

        Raises ValueError for a file that cannot be read or is not UTF-8, a bad JSONL line, and
        when the whole corpus holds no text.
        """
        found = False
        for path in self.files:
            if _is_jsonl(path, named=path == self.root):
                documents = _jsonl_documents(path, self.json_key)
            else:
                documents = _text_document(path)
            for document in documents:
                if document.text:
                    found = True
                    yield document
        if not found:
            raise ValueError(
                f"source={self.source} holds no text: {len(self.files)} file(s) were read and every"
                " document is empty. Give a source with text in it."
            )


def open_corpus(source: str | Path, json_key: str = "text") -> Corpus:
    """Find the files of a source, in a fixed order, without reading them.

    `source` is a text file, a JSONL file, a folder (searched recursively; hidden names are
    skipped), or `stdlib` (a folder of that name is spelled `./stdlib`).

    Raises ValueError when the source does not exist, is empty, or has no file of a known kind.
    """
    if str(source) == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        files = _library_files(root)
        rule = f"no .py file was found under {root}. Give a text file or a folder."
    else:
        root = Path(source).absolute()
        if not root.exists():
            raise ValueError(
                f"source={source} does not exist. Give a text file, a JSONL file, a folder, or"
                f" `{STDLIB}` for the source text of Python's standard library."
            )
        files = _folder_files(root) if root.is_dir() else (root,)
        known = " ".join(sorted(TEXT_SUFFIXES | JSONL_SUFFIXES))
        rule = f"the folder has no file with a known suffix ({known}). Add or rename files."
    if not files:
        raise ValueError(f"source={source} is empty: {rule}")
    corpus = Corpus(str(source), root, files, json_key)
    if corpus.size == 0:
        raise ValueError(
            f"source={source} is empty: its {len(files)} file(s) have 0 bytes."
            " Give a source with text in it."
        )
    return corpus


def _is_jsonl(path: Path, named: bool) -> bool:
    # In a folder, .json is some tool's configuration; a file named by the user is their data.
    return path.suffix in JSONL_SUFFIXES or (named and path.suffix == ".json")


def _folder_files(root: Path) -> tuple[Path, ...]:
    found = []
    for folder, subfolders, names in os.walk(root, onerror=_refuse_folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        for name in names:
            path = Path(folder, name)
            if not name.startswith(".") and path.suffix in TEXT_SUFFIXES | JSONL_SUFFIXES:
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


def _unreadable(path: Path | str, error: OSError) -> str:
    return f"{path} cannot be read ({error.strerror}). Fix its permissions or leave it out."


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
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ValueError(_unreadable(path, error)) from error
    mark = len(_BYTE_ORDER_MARK) if raw.startswith(_BYTE_ORDER_MARK) else 0
    yield Document(_decode(raw[mark:], path, mark), len(raw))


def _jsonl_documents(path: Path, json_key: str) -> Iterator[Document]:
    try:
        with path.open("rb") as file:
            offset = 0
            for number, raw in enumerate(file, start=1):
                mark = len(_BYTE_ORDER_MARK) if offset == 0 and raw[:3] == _BYTE_ORDER_MARK else 0
                line = _decode(raw[mark:], path, offset + mark)
                offset += len(raw)
                if line.strip():
                    yield Document(_json_text(line, json_key, f"{path}:{number}"), len(raw))
    except OSError as error:
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
    text = value[json_key]
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
