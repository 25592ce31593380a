"""A tokenizer: a sentencepiece model trained on documents, or a file of any known kind."""

import hashlib
import io
import json
import os
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from lightning_dhellam.data.tokenizer_kinds import read_tokenizer
from lightning_dhellam.files import write_atomically

FILE_NAMES = ("tokenizer.json", "tokenizer.model")
"""Of tokenizers in the folder of a model, or of a dataset."""

SAMPLE_BYTES = 64 * 2**20
"""Training reads at most this much text (about 10 s); a larger corpus is thinned evenly."""

MINIMUM_VOCAB_SIZE = 3 + 256 + 1
"""unk, bos and eos, a piece for each byte, and one to learn."""

NO_PAD = -2
"""Megatron warns about a padding id that is also the end-of-document id, and that may be -1."""

_CHUNK_CHARACTERS = 4000
# The trainer silently skips any sentence with one of these, so they are blanked while training.
# When encoding they are ordinary input: byte fallback covers them.
_RESERVED = str.maketrans({"\0": " ", "\t": " ", "\u2581": " ", "\u2585": " "})


class Tokenizer:
    """Text to token ids and back, by a file of any of the kinds of `tokenizer_kinds`.

    Also what Megatron-core's datasets ask of a tokenizer: `vocab_size`, `eod`, `pad` and
    `unique_identifiers`. Encoding is lossless for a tokenizer trained here, except that
    sentencepiece cannot tell U+2581 from a space.

    Args:
        model: content of a sentencepiece `tokenizer.model`, a `tokenizer.json` of Hugging Face or a
            `tokenizer.model` of Llama 3.
        eod_token: token that ends a document; None for what the file says, or models usually have.

    Raises ValueError if it is of no such kind, or has no such token.
    """

    def __init__(self, model: bytes, eod_token: str | None = None) -> None:
        self.model = model
        self.eod_token = eod_token
        self._reader = read_tokenizer(model, eod_token)

    def __reduce__(self) -> tuple[Any, ...]:
        # By its file: what tokenizers pickles has lost that special tokens in a text are text.
        return type(self), (self.model, self.eod_token)

    @classmethod
    def load(cls, path: str | Path, eod_token: str | None = None) -> "Tokenizer":
        """Read a file of a tokenizer, or of a folder of a model the one in it.

        A `tokenizer_config.json` beside it may say what ends a document. Raises ValueError if the
        file is missing, or is none; it is named, and so is what it seems to be.
        """
        file = _in_folder(Path(path))
        try:
            model = file.read_bytes()
        except OSError as error:
            raise ValueError(
                f"tokenizer={path} cannot be read ({error.strerror})."
                " Give the path of a tokenizer.model or tokenizer.json."
            ) from error
        try:
            return cls(model, eod_token or _said_beside(file))
        except ValueError as error:
            raise ValueError(f"tokenizer={path} {error}.") from error

    def save(self, path: str | Path) -> None:
        """Write the file; an interrupted write leaves the old one as it was."""
        write_atomically(Path(path), self.model)

    @property
    def file_name(self) -> str:
        """What such a file is called: `tokenizer.model` or `tokenizer.json`."""
        return self._reader.file_name

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included."""
        return self._reader.vocab_size

    @property
    def eod(self) -> int:
        """The id that ends a document, or -1 if there is none."""
        return self._reader.eod

    @property
    def pad(self) -> int:
        """An id that no document holds, so that Megatron never takes real text for padding."""
        return NO_PAD

    @property
    def sha256(self) -> str:
        """Hash of the file."""
        return hashlib.sha256(self.model).hexdigest()

    @property
    def unique_identifiers(self) -> "OrderedDict[str, str]":
        """What Megatron's index cache is keyed by: the content, wherever the file lies."""
        return OrderedDict([("class", self._reader.library), ("sha256", self.sha256)])

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, without an end-of-document id."""
        return self._reader.encode_many([text], 1)[0]

    def encode_many(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """The token ids of each text, encoded by about `threads` threads."""
        return self._reader.encode_many(texts, threads)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; end-of-document ids have no text."""
        return self._reader.decode(ids)


def _in_folder(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = [path / name for name in FILE_NAMES if (path / name).is_file()]
    if not found:
        raise ValueError(f"tokenizer={path} is a folder without {' or '.join(FILE_NAMES)}.")
    return found[0]


def _said_beside(file: Path) -> str | None:
    """The token that ends a document by the `tokenizer_config.json` of the same model."""
    if file.suffix != ".json":
        return None  # a sentencepiece model says it, and Llama 3's is known
    try:
        fields = json.loads((file.parent / "tokenizer_config.json").read_bytes())
    except (OSError, ValueError):
        return None
    token = fields.get("eos_token") if isinstance(fields, dict) else None
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


class BareVocabulary:
    """Stands in for the tokenizer of a dataset of which only the vocabulary size is known."""

    eod = -1
    pad = NO_PAD

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.unique_identifiers = OrderedDict(
            [("class", type(self).__name__), ("vocab_size", str(vocab_size))]
        )


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, sample_bytes: int = SAMPLE_BYTES
) -> Tokenizer:
    """Train a BPE model with byte fallback; the same texts give the same model.

    Raises ValueError if `vocab_size` is out of range for these texts.
    """
    if vocab_size < MINIMUM_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: {MINIMUM_VOCAB_SIZE} is the least"
            " (3 special ids, 256 bytes, one learned piece). Give a larger --vocab_size."
        )
    learned = vocab_size - MINIMUM_VOCAB_SIZE + 1
    # At most half the pieces are characters, so that there is room for longer ones.
    sample = _without_rare_characters(sample_chunks(texts, sample_bytes), (learned + 1) // 2)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=1.0,
            # The next five make encoding lossless: source code lives by its whitespace.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * _CHUNK_CHARACTERS + 4,
            num_threads=min(4, os.cpu_count() or 1),
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(
            f"vocab_size={vocab_size} does not suit this corpus (sentencepiece: {error})."
            " Give another --vocab_size or more text."
        ) from error
    return Tokenizer(model.getvalue())


def sample_chunks(texts: Iterable[str], sample_bytes: int) -> list[str]:
    """Cut texts into chunks of whole lines and keep an even selection of `sample_bytes` bytes.

    One pass and bounded memory: whenever the selection is full, every second chunk is dropped and
    from there on half as many are taken.
    """
    kept: list[str] = []
    size = 0
    stride = 1
    for number, chunk in enumerate(_chunks(texts)):
        if number % stride:
            continue
        kept.append(chunk)
        size += len(chunk.encode())
        while size > sample_bytes and len(kept) > 1:
            kept = kept[::2]
            size = sum(len(chunk.encode()) for chunk in kept)
            stride *= 2
    return kept


def _chunks(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        start = 0
        while start < len(text):
            end = start + _CHUNK_CHARACTERS
            if end < len(text):
                line_end = text.rfind("\n", start, end) + 1
                end = line_end or end
            yield text[start:end].translate(_RESERVED)
            start = end


def _without_rare_characters(sample: Sequence[str], room: int) -> list[str]:
    """Blank the characters that get no piece of their own: byte fallback will encode them.

    These are the rarest 0.01%, and in a script with more characters than the vocabulary has room
    for, all but the `room` most frequent; the trainer would refuse that vocabulary size.
    """
    counts: Counter[str] = Counter()
    for chunk in sample:
        counts.update(chunk)
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    enough = 0.9999 * counts.total()
    covered = 0
    rare: dict[str, str] = {}
    for rank, character in enumerate(ranked):
        if covered >= enough or rank >= room:
            rare[character] = " "
        covered += counts[character]
    table = str.maketrans(rare)
    return [chunk.translate(table) for chunk in sample]
