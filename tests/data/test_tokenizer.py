import pickle
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_dhellam.data.tokenizer import Tokenizer, sample_chunks, train_tokenizer

CODE = "def f(self):\n        return self.x\n\n\nclass A:\n\tpass\n" * 40
TRAINED = train_tokenizer([CODE], 300)


# Surrogates have no UTF-8 form; U+2581 is sentencepiece's own sign for a space.
@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_encoding_is_lossless(text: str) -> None:
    assert TRAINED.decode(TRAINED.encode(text)) == text


@pytest.mark.parametrize("text", ["\n\n\t  x  \r\n", "a\0b", "<s></s><0x0A>", "e\u0301 ﬁ 日本 🎉"])
def test_whitespace_controls_and_rare_characters_survive(text: str) -> None:
    ids = TRAINED.encode(text)
    assert TRAINED.decode(ids) == text
    assert TRAINED.eod not in ids
    assert 0 not in ids, "byte fallback leaves nothing unknown"


def test_training_is_deterministic_and_has_the_size_asked_for() -> None:
    assert train_tokenizer([CODE], 300).model == TRAINED.model
    assert TRAINED.vocab_size == 300
    assert TRAINED.eod == 2


def test_encode_many_keeps_order_with_threads() -> None:
    texts = [CODE[:n] for n in range(50)]
    assert TRAINED.encode_many(texts, threads=2) == [TRAINED.encode(text) for text in texts]


def test_text_that_the_trainer_reserves_is_still_learned_from() -> None:
    tabs = "\tif (ready)\0 launch();\u2581\u2585\n" * 50
    assert len(train_tokenizer([tabs], 280).encode("launch();")) < len("launch();")


def test_more_characters_than_pieces_fall_back_to_bytes() -> None:
    text = "".join(map(chr, range(0x4E00, 0x4E00 + 1000))) + "the the the the"
    tokenizer = train_tokenizer([text], 300)
    assert tokenizer.vocab_size == 300
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sampling_is_even_and_bounded() -> None:
    texts = [f"{n:04}" for n in range(1000)]
    assert sample_chunks(texts, 10**6) == texts
    kept = [int(text) for text in sample_chunks(texts, 400)]
    assert 25 <= len(kept) <= 100
    assert {later - earlier for earlier, later in pairwise(kept)} == {16}


def test_chunks_are_whole_lines_that_join_to_the_text() -> None:
    text = "short line\n" * 1000 + "x" * 9000
    chunks = sample_chunks([text], 10**6)
    assert "".join(chunks) == text
    assert all(len(chunk) <= 4000 for chunk in chunks)
    assert chunks[0].endswith("\n")


def test_save_load_and_pickle(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.model"
    TRAINED.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.unique_identifiers == TRAINED.unique_identifiers
    assert loaded.encode(CODE) == TRAINED.encode(CODE)
    assert pickle.loads(pickle.dumps(loaded)).encode(CODE) == TRAINED.encode(CODE)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.model"]


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab_size=100 is too small: 260 is the least"):
        train_tokenizer([CODE], 100)
    with pytest.raises(ValueError, match=r"vocab_size=9999 does not suit this corpus .*--vocab_si"):
        train_tokenizer([CODE], 9999)
    with pytest.raises(ValueError, match=r"tokenizer=.*none\.model cannot be read"):
        Tokenizer.load(tmp_path / "none.model")
    for content in (b"", b"hello", TRAINED.model[:1000]):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.model is no tokenizer: it is neither"):
            Tokenizer.load(tmp_path / "bad.model")
