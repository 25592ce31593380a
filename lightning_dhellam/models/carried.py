"""Files that belong to a model and hold none of its weights: its tokenizer, how it generates."""

from __future__ import annotations

import shutil
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any

from lightning_dhellam.data.tokenizer_kinds import read_tokenizer
from lightning_dhellam.files import read_json

GENERATION = "generation_config.json"
_OF_TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)


def carry(origin: Path | None, tokenizer: Any, folder: Path) -> None:
    """Copy what belongs to a model into the folder that it is saved to.

    Args:
        origin: the folder that its weights are from.
        tokenizer: the folder of another tokenizer, one of its files, or one of transformers.
        folder: of the saved model.

    Raises:
        ValueError: `tokenizer` is none.
    """
    if origin is not None and (origin / GENERATION).is_file():
        shutil.copyfile(origin / GENERATION, folder / GENERATION)
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(folder)
    elif tokenizer is not None:
        if not isinstance(tokenizer, str | PathLike) or not _copy_tokenizer(
            Path(tokenizer), folder
        ):
            raise ValueError(
                f"tokenizer={tokenizer!r} is none: give a folder with {_OF_TOKENIZERS[0]} or"
                f" {_OF_TOKENIZERS[1]}, or a tokenizer of transformers"
            )
    elif origin is not None:
        _copy_tokenizer(origin, folder)


def _copy_tokenizer(source: Path, folder: Path) -> bool:
    """Copy its files, if there are any."""
    if source.is_file():
        source = source.parent
    found = [source / name for name in _OF_TOKENIZERS if (source / name).exists()]
    for path in found:
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)
    return bool(found)


def check_vocabulary(folder: Path, vocab_size: int) -> None:
    """Refuse the tokenizer of a folder if it makes tokens that a model does not have.

    Raises:
        ValueError: with the number of its tokens, and of the model's.
    """
    for name, ids in _tokens(folder):
        if ids > vocab_size:
            raise ValueError(
                f"{name} in {folder} has {ids} tokens, and the model vocab_size={vocab_size}: it"
                " would look up what is not there; use the tokenizer of the model, or a model whose"
                " embedding was enlarged for it"
            )


def _tokens(folder: Path) -> list[tuple[str, int]]:
    """Each file of a tokenizer, with how many tokens it makes; none of what cannot be read."""
    found = []
    for name in ("tokenizer.json", "added_tokens.json", "vocab.json"):
        if (folder / name).is_file():
            fields = read_json(folder / name, "file of a tokenizer", "fetch it again")
            found.append((name, 1 + max(_ids(fields), default=-1)))
    model = folder / "tokenizer.model"
    if model.is_file() and not found:
        with suppress(ValueError):  # of a kind that only its own code reads
            found.append((model.name, read_tokenizer(model.read_bytes()).vocab_size))
    return found


def _ids(fields: dict[str, Any]) -> list[int]:
    """The ids of a `tokenizer.json`, or of a file that has tokens alone."""
    model = fields.get("model")
    if not isinstance(model, dict):
        return [number for number in fields.values() if isinstance(number, int)]
    vocabulary = model.get("vocab") or {}
    own = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    added = fields.get("added_tokens") or []
    return own + [token["id"] for token in added]
