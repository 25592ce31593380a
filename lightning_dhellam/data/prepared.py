"""A prepared dataset on disk: a directory of a tokenizer, Megatron's two files, their facts."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning_dhellam.data.tokenizer import FILE_NAMES, Tokenizer

FORMAT = 1
META = "meta.json"
CACHE = "index-cache"
DATA = "data"
"""Megatron's prefix inside the directory: data.bin holds the tokens, data.idx the documents."""


@dataclass(frozen=True)
class PreparedData:
    """A finished output of `dhellam data prepare`.

    `fingerprint` says what it was made from; `reused` that it was found finished, not made now.
    """

    path: Path
    vocab_size: int
    documents: int
    tokens: int
    source: str
    fingerprint: dict[str, Any]
    reused: bool = False

    @property
    def prefix(self) -> Path:
        """Megatron's dataset prefix: the path of the .bin and .idx files without the suffix."""
        return self.path / DATA

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """What the text was encoded by."""
        (name,) = [name for name in FILE_NAMES if (self.path / name).is_file()]
        return Tokenizer.load(self.path / name, self.fingerprint.get("eod_token"))

    @classmethod
    def load(cls, path: str | Path) -> "PreparedData":
        """Read what a finished directory says of itself.

        Raises ValueError when it is not one, or when its files are not as they were written.
        """
        path = Path(path).absolute()
        meta = _read_meta(path)
        for name, size in meta["files"].items():
            file = path / name
            found = file.stat().st_size if file.is_file() else None
            if found != size:
                state = "is missing" if found is None else f"has {found} bytes"
                raise ValueError(
                    f"{file} {state}, but {META} says {size} bytes."
                    " Prepare the data again with --overwrite."
                )
        return cls(
            path=path,
            vocab_size=meta["vocab_size"],
            documents=meta["documents"],
            tokens=meta["tokens"],
            source=meta["source"],
            fingerprint=meta["fingerprint"],
        )


def is_prepared(path: str | Path) -> bool:
    """Whether a directory holds a finished dataset: its facts are written last."""
    return (Path(path) / META).is_file()


def _read_meta(path: Path) -> dict[str, Any]:
    file = path / META
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{path} is not a prepared dataset ({META}: {error.strerror})."
            f" Make it with: {prepare_hint(path)}"
        ) from error
    except ValueError as error:
        meta = {}
        reason: Exception | None = error
    else:
        reason = None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise ValueError(
            f"{file} is not a description of format {FORMAT}."
            " Prepare the data again with --overwrite."
        ) from reason
    return meta


def prepare_hint(path: str | Path) -> str:
    """The command that makes a prepared dataset at `path`."""
    return f"dhellam data prepare --source <text, JSONL, folder or stdlib> --output {path}"
