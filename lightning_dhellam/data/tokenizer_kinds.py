"""Files of tokenizers, told apart by what is in them, and what reads each kind.

sentencepiece   a protobuf: `tokenizer.model` of Llama 1 and 2, and of `dhellam data prepare`
Hugging Face    JSON: `tokenizer.json` of any model, read by the library tokenizers
tiktoken        lines of a token in base64 and its rank: `tokenizer.model` of Llama 3
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any, Protocol

import sentencepiece

_INSTALL = "needs the library tokenizers: pip install 'lightning-dhellam[data]'"
_ENDS = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<|end▁of▁sentence|>", "[EOS]")
"""What models call the end of a document, where the file does not say it."""

# Of Llama 3 and 3.1, whose files hold neither.
_LLAMA_3_RANKS = 128_000
_LLAMA_3_SPECIAL = 256
_LLAMA_3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_3_NAMED = {0: "<|begin_of_text|>", 1: "<|end_of_text|>"}


class Reader(Protocol):
    """What a file of a tokenizer does.

    Attributes:
        file_name: of such a file, in a folder of a model.
        library: that reads it.
        vocab_size: number of token ids, special ones included.
        eod: the id that ends a document, or -1.
    """

    file_name: str
    library: str
    vocab_size: int
    eod: int

    def encode_many(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """The token ids of each text, of which none is special."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids."""


class SentencePiece:
    """A sentencepiece model; see `Reader`."""

    file_name = "tokenizer.model"
    library = "sentencepiece"

    def __init__(self, model: bytes) -> None:
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size = int(self._processor.vocab_size())
        self.eod = int(self._processor.eos_id())
        if not self.vocab_size:
            raise ValueError("it has no tokens")

    def encode_many(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """See `Reader`."""
        ids: list[list[int]] = self._processor.encode(list(texts), num_threads=threads)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """See `Reader`; special ids have no text."""
        text: str = self._processor.decode([int(token) for token in ids])
        return text


class Fast:
    """A tokenizer of the library tokenizers, which takes as many threads as it likes.

    Args:
        tokenizer: of that library.
        file_name: where it was read from.
        eod_token: that ends a document; None for the one that models usually have.
    """

    library = "tokenizers"

    def __init__(self, tokenizer: Any, file_name: str, eod_token: str | None) -> None:
        # What looks like a special token in a text is text.
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.file_name = file_name
        self._tokenizer = tokenizer
        self.vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        ids = (tokenizer.token_to_id(name) for name in (_ENDS if not eod_token else [eod_token]))
        self.eod = next((id for id in ids if id is not None), -1)
        if eod_token and self.eod < 0:
            raise ValueError(f"has no token {eod_token!r}, which is to end a document")

    def encode_many(self, texts: Sequence[str], threads: int) -> list[list[int]]:
        """See `Reader`."""
        found = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def decode(self, ids: Sequence[int]) -> str:
        """See `Reader`; special ids have no text."""
        text: str = self._tokenizer.decode([int(token) for token in ids], skip_special_tokens=True)
        return text


def read_tokenizer(model: bytes, eod_token: str | None = None) -> Reader:
    """What reads the file of a tokenizer with this content.

    Args:
        model: the file.
        eod_token: token that ends a document, for a file that does not say.

    Raises:
        ValueError: it is not such a file; the message says what it seems to be, without its name.
    """
    if model.startswith(b"version https://git-lfs"):
        raise ValueError("is a pointer of Git LFS, not the file itself: get it with 'git lfs pull'")
    if model.lstrip()[:1] in (b"{", b"["):
        return Fast(_hugging_face(model), "tokenizer.json", eod_token)
    ranks = _tiktoken_ranks(model)
    if ranks is not None:
        return Fast(_llama_3(ranks), "tokenizer.model", eod_token)
    try:
        return SentencePiece(model)
    except (RuntimeError, ValueError, TypeError):
        raise ValueError(
            "is no tokenizer: it is neither a sentencepiece tokenizer.model nor a tokenizer.json"
            " of Hugging Face nor a tokenizer.model of Llama 3"
        ) from None


def _hugging_face(model: bytes) -> Any:
    try:
        fields = json.loads(model)
    except ValueError as error:
        raise ValueError(f"is not whole JSON ({error}): get it again") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model"), dict):
        what = "tokenizer_config.json" if "tokenizer_class" in fields else "JSON of another kind"
        raise ValueError(f"is {what}: give the tokenizer.json of the same model")
    tokenizers = _tokenizers("is a tokenizer.json")
    try:
        return tokenizers.Tokenizer.from_str(model.decode())
    except Exception as error:  # the library raises nothing more special
        raise ValueError(
            f"cannot be read by tokenizers {tokenizers.__version__} ({error}): use a newer one"
        ) from error


def _tiktoken_ranks(model: bytes) -> dict[bytes, int] | None:
    """Tokens with their ranks; None if this is no such file."""
    ranks: dict[bytes, int] = {}
    try:
        for line in model.splitlines():
            if line:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
    except ValueError:
        return None
    return ranks or None


def _llama_3(ranks: dict[bytes, int]) -> Any:
    if len(ranks) != _LLAMA_3_RANKS:
        raise ValueError(
            f"is a tiktoken file of {len(ranks):,} tokens, and does not say how it cuts words: of"
            f" these only Llama 3's ({_LLAMA_3_RANKS:,}) is known; give the model's tokenizer.json"
        )
    special = [
        _LLAMA_3_NAMED.get(number, f"<|reserved_special_token_{number}|>")
        for number in range(_LLAMA_3_SPECIAL)
    ]
    return from_ranks(ranks, _LLAMA_3_PATTERN, special)


def from_ranks(ranks: dict[bytes, int], pattern: str, special: Sequence[str]) -> Any:
    """The tokenizer that tiktoken makes of such a file, in the library tokenizers.

    Args:
        ranks: of tokens: the pair of parts of a word whose token has the lowest is joined first.
        pattern: regular expression of a word.
        special: tokens that come after them.
    """
    tokenizers = _tokenizers("is a tiktoken file")
    shown = _shown_bytes()

    def show(token: bytes) -> str:
        return "".join(shown[byte] for byte in token)

    merges = [
        (show(left), show(right))
        for token in sorted(ranks, key=ranks.__getitem__)
        for left, right in _joined_of(token, ranks)
    ]
    vocabulary = {show(token): rank for token, rank in ranks.items()}
    model = tokenizers.models.BPE(vocabulary, merges, ignore_merges=True)
    made = tokenizers.Tokenizer(model)
    word = tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([word, letters])
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(list(special))
    return made


def _joined_of(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pairs of tokens that a token may be joined of, by their ranks."""
    pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
    known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
    return sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))


def _shown_bytes() -> dict[int, str]:
    """The letter that byte-level vocabularies (GPT-2) show each byte as."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in own]
    return {byte: chr(byte) for byte in own} | {
        byte: chr(256 + number) for number, byte in enumerate(others)
    }


def _tokenizers(what: str) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ValueError(f"{what}, which {_INSTALL}") from error
    return tokenizers
