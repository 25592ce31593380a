"""From a corpus to a prepared dataset: tokenizer, then Megatron's .bin and .idx, all or nothing."""

import json
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from tqdm import tqdm

from lightning_dhellam.data.config import DEFAULT_VOCAB_SIZE, PrepareConfig
from lightning_dhellam.data.corpus import STDLIB, Corpus, Document, open_corpus
from lightning_dhellam.data.prepared import (
    CACHE,
    DATA,
    FORMAT,
    META,
    PreparedData,
    is_prepared,
)
from lightning_dhellam.data.tokenizer import (
    FILE_NAMES,
    SAMPLE_BYTES,
    Tokenizer,
    train_tokenizer,
)
from lightning_dhellam.files import check_folder, save_text, staged_directory, write_error

_FILES = (DATA + ".bin", DATA + ".idx")
_BATCH_CHARACTERS = 4 * 2**20


def prepare(
    source: str | Path | Sequence[str | Path], output: str | Path, **options: Any
) -> PreparedData:
    """Make a prepared dataset, or return it if it already exists and was made from the same.

    `options` are the further fields of PrepareConfig. The output appears whole or not at all.
    Raises ValueError for every mistake in the input, and when `output` was made differently and
    `overwrite` is not set.
    """
    sources = [source] if isinstance(source, str | Path) else source
    config = PrepareConfig([str(one) for one in sources], str(output), **options)
    corpus = open_corpus(config.source, config.json_key)
    given = _given_tokenizer(config)
    fingerprint = _fingerprint(config, corpus, given)
    target = Path(output).absolute()
    finished = _finished(target, fingerprint, config.overwrite)
    if finished is not None:
        return finished
    check_folder(target.parent, f"output={output}")
    with staged_directory(target, replace=True) as folder:
        tokenizer = given or _train(config, corpus)
        tokenizer.save(folder / tokenizer.file_name)
        documents, tokens = _write_dataset(config, corpus, tokenizer, folder)
        _write_meta(config, tokenizer, documents, tokens, fingerprint, folder)
    return PreparedData.load(target)


def _given_tokenizer(config: PrepareConfig) -> Tokenizer | None:
    if config.tokenizer is None:
        return None
    tokenizer = Tokenizer.load(config.tokenizer, config.eod_token)
    if config.vocab_size not in (None, tokenizer.vocab_size):
        raise ValueError(
            f"vocab_size={config.vocab_size}, but tokenizer={config.tokenizer} has"
            f" {tokenizer.vocab_size} ids. Leave out --vocab_size or --tokenizer."
        )
    if config.append_eod and tokenizer.eod < 0:
        raise ValueError(
            f"tokenizer={config.tokenizer} has no end-of-document id (eos)."
            " Name the token with --eod_token, pass --append_eod=false, or give another tokenizer."
        )
    return tokenizer


def _fingerprint(
    config: PrepareConfig, corpus: Corpus, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    return {
        "source": _one_or_all(
            [
                source if source == STDLIB else str(root)
                for source, root in zip(corpus.sources, corpus.roots, strict=True)
            ]
        ),
        "source_files": len(corpus.files),
        "source_bytes": corpus.size,
        "source_sizes_and_times": corpus.digest(),
        "json_key": config.json_key if corpus.has_keys else None,
        "tokenizer": tokenizer.sha256 if tokenizer else None,
        "vocab_size": tokenizer.vocab_size if tokenizer else _vocab_size(config),
        "eod_token": tokenizer.eod_token if tokenizer else None,
        "append_eod": config.append_eod,
        "max_document_tokens": config.max_document_tokens,
    }


def _one_or_all(names: list[str]) -> str | list[str]:
    """One source is named as such, as in datasets of version 0.1."""
    return names[0] if len(names) == 1 else names


def _vocab_size(config: PrepareConfig) -> int:
    return DEFAULT_VOCAB_SIZE if config.vocab_size is None else config.vocab_size


def _finished(target: Path, fingerprint: dict[str, Any], overwrite: bool) -> PreparedData | None:
    """The dataset at `target` if it is finished and the same; None if it is to be made."""
    if not is_prepared(target):
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise ValueError(
                f"output={target} exists and is not a prepared dataset."
                " Choose another --output or remove it."
            )
        return None
    if overwrite:
        foreign = {file.name for file in target.iterdir()} - {*(META, CACHE, *FILE_NAMES, *_FILES)}
        if foreign:
            raise ValueError(
                f"output={target} also holds {', '.join(sorted(foreign))}, which --overwrite would"
                " remove. Choose another --output or move these away."
            )
        return None
    prepared = PreparedData.load(target)
    for name, now in fingerprint.items():
        before = prepared.fingerprint.get(name)
        if before != now:
            raise ValueError(
                f"output={target} was prepared with {name}={before}, now {name}={now}."
                " Pass --overwrite to replace it or choose another --output."
            )
    return replace(prepared, reused=True)


def _train(config: PrepareConfig, corpus: Corpus) -> Tokenizer:
    documents = _with_progress(config, corpus, "reading")
    return train_tokenizer(
        (document.text for document in documents), _vocab_size(config), SAMPLE_BYTES
    )


def _write_dataset(
    config: PrepareConfig, corpus: Corpus, tokenizer: Tokenizer, folder: Path
) -> tuple[int, int]:
    """Write data.bin and data.idx. Returns the number of documents and of tokens."""
    prefix = str(folder / DATA)
    builder = IndexedDatasetBuilder(
        prefix + ".bin", dtype=DType.optimal_dtype(tokenizer.vocab_size)
    )
    documents = tokens = read = 0
    try:
        for batch in _batches(_with_progress(config, corpus, "tokenizing")):
            encoded = tokenizer.encode_many([d.text for d in batch], config.threads)
            for document, ids in zip(batch, encoded, strict=True):
                if config.append_eod:
                    ids.append(tokenizer.eod)
                limit = config.max_document_tokens or max(1, len(ids))
                for start in range(0, len(ids), limit):
                    piece = numpy.asarray(ids[start : start + limit])
                    builder.add_document(piece, [len(piece)])
                    documents += 1
                tokens += len(ids)
                read += document.source_bytes
        builder.finalize(prefix + ".idx")
    except OSError as error:
        files = [Path(prefix + end) for end in (".bin", ".idx")]
        written = sum(file.stat().st_size for file in files if file.exists())
        needed = int(written * corpus.size / read) if read else None
        at = Path(config.output).absolute() / files[0].name
        raise write_error(at, error, written, needed, about="about ") from error
    finally:
        with suppress(OSError):  # what it still holds finds no room either
            builder.data_file.close()
    return documents, tokens


def _write_meta(
    config: PrepareConfig,
    tokenizer: Tokenizer,
    documents: int,
    tokens: int,
    fingerprint: dict[str, Any],
    folder: Path,
) -> None:
    meta = {
        "format": FORMAT,
        "source": ", ".join(config.source),
        "vocab_size": tokenizer.vocab_size,
        "documents": documents,
        "tokens": tokens,
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
        "fingerprint": fingerprint,
        "versions": {"python": platform.python_version(), **_versions()},
    }
    save_text(folder / META, json.dumps(meta, indent=2) + "\n")


def _versions() -> dict[str, str]:
    found = {}
    for name in ("lightning-dhellam", "megatron-core", "sentencepiece", "tokenizers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _with_progress(config: PrepareConfig, corpus: Corpus, name: str) -> Iterator[Document]:
    with tqdm(
        total=corpus.size,
        desc=name,
        unit="B",
        unit_scale=True,
        disable=None if config.progress else True,
    ) as bar:
        for document in corpus.documents():
            yield document
            bar.update(document.source_bytes)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
