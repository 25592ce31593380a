"""Tokenizers of other makers: a tokenizer.json of Hugging Face, and Llama 3's tiktoken file."""

import base64
import json
import pickle
import random
import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from megatron.core.datasets.indexed_dataset import IndexedDataset

from lightning_dhellam.data import tokenizer_kinds
from lightning_dhellam.data.prepare import prepare
from lightning_dhellam.data.tokenizer import Tokenizer
from lightning_dhellam.data.tokenizer_kinds import from_ranks

CODE = "def f(self):\n        return self.x\n\n\nclass A:\n\tpass\n" * 40
WORDS = r"[^\s]+|\s+(?!\S)|\s+"


def _hugging_face(folder: Path, end: str = "<|end_of_text|>", config: object = None) -> Path:
    """A small byte-level tokenizer.json, and what lies beside it."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", end], initial_alphabet=letters, show_progress=False
    )
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator([CODE], trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def test_a_tokenizer_of_hugging_face(tmp_path: Path) -> None:
    file = _hugging_face(tmp_path / "model")
    tokenizer = Tokenizer.load(file)
    assert 258 < tokenizer.vocab_size <= 300 and tokenizer.eod == 1
    assert tokenizer.file_name == "tokenizer.json"
    text = CODE + "\ttabs, 日本語 \U0001f600 <|end_of_text|>"
    ids = tokenizer.encode(text)
    assert 0 not in ids, "no token that the text does not have"
    assert 1 not in ids, "an end of document that stands in a text is text"
    assert tokenizer.decode(ids) == text and tokenizer.decode([*ids, 1]) == text
    assert tokenizer.encode_many([text, "x"], threads=2) == [ids, tokenizer.encode("x")]
    again = pickle.loads(pickle.dumps(Tokenizer.load(file.parent)))
    assert again.encode(text) == ids and again.unique_identifiers == tokenizer.unique_identifiers
    assert tokenizer.unique_identifiers["class"] == "tokenizers"


@pytest.mark.parametrize("said", ["<stop>", {"content": "<stop>", "lstrip": False}])
def test_what_ends_a_document_is_said_beside_or_given(said: object, tmp_path: Path) -> None:
    file = _hugging_face(tmp_path / "said", "<stop>", {"eos_token": said})
    assert Tokenizer.load(file).eod == 1
    silent = _hugging_face(tmp_path / "silent", "<stop>")
    assert Tokenizer.load(silent).eod == -1
    assert Tokenizer.load(silent, "<s>").eod == 0
    with pytest.raises(ValueError, match=r"tokenizer\.json has no token '<go>', which is to end"):
        Tokenizer.load(silent, "<go>")


def _ranks() -> dict[bytes, int]:
    """All bytes, then pieces as tiktoken learns them: each is two earlier ones."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    learned = [b"  ", b"de", b"def", b"re", b"ret", b"in", b" in", b"    ", b"return", b"ur", b"un"]
    learned += [b"urn", b"retur", b"\xe6\x97", b"\xe6\x97\xa5"]
    return ranks | {piece: 256 + number for number, piece in enumerate(learned)}


def _as_tiktoken_does(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """A whole word if it is a token; else the pair of lowest rank is joined first."""
    if word in ranks:
        return [ranks[word]]
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        pairs = [
            (ranks[left + right], place)
            for place, (left, right) in enumerate(pairwise(parts))
            if left + right in ranks
        ]
        if not pairs:
            return [ranks[part] for part in parts]
        _, place = min(pairs)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def test_a_tokenizer_of_tiktoken_joins_as_tiktoken_does() -> None:
    ranks = _ranks()
    made = from_ranks(ranks, WORDS, ["<|begin|>", "<|end|>"])
    generator = random.Random(5)
    for _ in range(200):
        letters = generator.choices("detfrun i日é", k=generator.randint(1, 12))
        text = "".join(letters)
        expected = [
            token
            for word in re.findall(WORDS, text)
            for token in _as_tiktoken_does(word.encode(), ranks)
        ]
        assert made.encode(text).ids == expected, text
        assert made.decode(expected) == text
    assert made.token_to_id("<|end|>") == len(ranks) + 1


def test_the_tokenizer_of_llama_3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = _ranks()
    lines = [f"{base64.b64encode(piece).decode()} {rank}" for piece, rank in ranks.items()]
    file = tmp_path / "tokenizer.model"
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"is a tiktoken file of 271 tokens.*tokenizer\.json\.$"):
        Tokenizer.load(file)
    monkeypatch.setattr(tokenizer_kinds, "_LLAMA_3_RANKS", len(ranks))
    tokenizer = Tokenizer.load(file)
    assert (tokenizer.vocab_size, tokenizer.eod) == (len(ranks) + 256, len(ranks) + 1)
    assert tokenizer.file_name == "tokenizer.model"
    text = "def it's 12345\n\n  return 日本 <|end_of_text|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and max(ids) < len(ranks)
    assert ids[0] == ranks[b"def"], "a word that is a token"


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("tokenizer.json", b'{"version": "1.0"', "is not whole JSON"),
        ("tokenizer_config.json", b'{"tokenizer_class": "X"}', "is tokenizer_config.json: give"),
        ("vocab.json", b'{"a": 1}', "is JSON of another kind: give the tokenizer.json"),
        ("tokenizer.json", b'{"model": {"type": "X"}}', "cannot be read by tokenizers 0"),
        ("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\noid 1", "Git LFS"),
        ("merges.txt", b"#version: 0.2\nt h\n", "is no tokenizer: it is neither a sentencepiece"),
    ],
)
def test_a_file_of_another_kind_is_named(
    name: str, content: bytes, sentence: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        Tokenizer.load(tmp_path / name)
    assert str(error.value).startswith(f"tokenizer={tmp_path / name} ")


def test_a_folder_without_a_tokenizer_and_a_missing_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"is a folder without tokenizer\.json or tokenizer\.mod"):
        Tokenizer.load(tmp_path)
    file = _hugging_face(tmp_path / "model")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"is a tokenizer\.json, which needs the library tokenize"):
        Tokenizer.load(file)


def test_data_is_prepared_and_read_with_a_tokenizer_of_hugging_face(tmp_path: Path) -> None:
    source = tmp_path / "text.txt"
    source.write_text(CODE)
    file = _hugging_face(tmp_path / "model", "<stop>", {"eos_token": "<stop>"})
    done = prepare(source, tmp_path / "out", tokenizer=str(file), progress=False)
    assert {path.name for path in done.path.iterdir()} >= {"tokenizer.json", "data.bin"}
    stored = IndexedDataset(str(done.prefix))
    assert len(stored) == 1
    document = stored[0]
    assert document[-1] == 1 == done.tokenizer.eod
    assert done.tokenizer.decode(document.tolist()) == CODE
    assert prepare(source, tmp_path / "out", tokenizer=str(file.parent), progress=False).reused
    with pytest.raises(ValueError, match=r"eod_token=<stop>, now eod_token=<s>\. Pass --overwrite"):
        prepare(source, tmp_path / "out", tokenizer=str(file), eod_token="<s>", progress=False)
