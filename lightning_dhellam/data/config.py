"""The options of `dhellam data prepare`. Imports nothing heavy: the command's help reads this."""

import os
from dataclasses import dataclass

from lightning_dhellam.values import check_fields

DEFAULT_VOCAB_SIZE = 8192


@dataclass(frozen=True)
class PrepareConfig:
    """What `dhellam data prepare` is told."""

    source: list[str]
    """A text file, a JSONL file (both may end in .gz), a Parquet file, a folder (searched
    recursively), or `stdlib` for the source text of Python's standard library. Given several
    times, all of them are taken, in this order."""

    output: str
    """Directory to make: the tokenizer, data.bin, data.idx and meta.json."""

    tokenizer: str | None = None
    """A tokenizer to use: a sentencepiece tokenizer.model, a tokenizer.json of Hugging Face, the
    tokenizer.model of Llama 3, or a folder with one. Left out, one is trained on the source."""

    eod_token: str | None = None
    """The token of the given tokenizer that ends a document, where its files do not say, or another
    one than they say."""

    vocab_size: int | None = None
    """Token ids of the tokenizer to train (8192 if left out), or the size that the given tokenizer
    must have."""

    json_key: str = "text"
    """Key of a JSONL line, or column of a Parquet file, that holds its text."""

    workers: int = 0
    """Threads that tokenize; 0 means one per CPU core."""

    append_eod: bool = True
    """End each document with the tokenizer's end-of-document id."""

    max_document_tokens: int | None = None
    """Cut longer documents into pieces of this many tokens. Splits and shuffling work on whole
    documents, so a corpus of a few long texts needs this to have a validation split."""

    overwrite: bool = False
    """Make the dataset again, in place of the one at the output."""

    progress: bool = True
    """Show progress bars."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.workers < 0:
            raise ValueError(
                f"workers={self.workers} is negative. Give --workers 1 or more, or 0 for all cores."
            )
        if self.max_document_tokens is not None and self.max_document_tokens < 1:
            raise ValueError(
                f"max_document_tokens={self.max_document_tokens} is not positive."
                " Give --max_document_tokens 1 or more, or leave it out."
            )

    @property
    def threads(self) -> int:
        return self.workers or os.cpu_count() or 1
