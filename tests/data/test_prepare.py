import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from lightning_dhellam.commands.data import data_command
from lightning_dhellam.data import prepare as prepare_module
from lightning_dhellam.data.config import PrepareConfig
from lightning_dhellam.data.prepare import prepare
from lightning_dhellam.data.prepared import PreparedData
from lightning_dhellam.data.tokenizer import Tokenizer
from lightning_dhellam.files import staged_directory, write_atomically
from tests.full_disk import full_disk

from .conftest import TEXTS

OPTIONS: dict[str, Any] = {"vocab_size": 300, "workers": 1}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    file = tmp_path / "source.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:20]))
    return file


def stored(data: PreparedData) -> list[list[int]]:
    dataset = IndexedDataset(str(data.prefix))
    return [dataset[number].tolist() for number in range(len(dataset))]


def test_the_dataset_decodes_to_the_corpus(prepared: PreparedData) -> None:
    documents = stored(prepared)
    eod = prepared.tokenizer.eod
    assert all(document[-1] == eod and eod not in document[:-1] for document in documents)
    assert [prepared.tokenizer.decode(document) for document in documents] == TEXTS
    assert prepared.tokens == sum(map(len, documents))
    assert prepared.documents == len(TEXTS)


def test_the_output_directory(prepared: PreparedData) -> None:
    names = {file.name for file in prepared.path.iterdir()} - {"index-cache"}
    assert names == {"tokenizer.model", "data.bin", "data.idx", "meta.json"}
    meta = json.loads((prepared.path / "meta.json").read_text())
    assert (meta["vocab_size"], meta["documents"], meta["tokens"]) == (300, 100, prepared.tokens)
    assert meta["fingerprint"]["source_files"] == 100
    assert {"python", "sentencepiece", "megatron-core"} <= set(meta["versions"])


def test_the_standard_library(tmp_path: Path) -> None:
    data = prepare("stdlib", tmp_path / "out", vocab_size=2048)
    first = data.tokenizer.decode(stored(data)[0])
    assert data.tokens > 1e6
    assert (tmp_path / "out" / "data.bin").stat().st_size == 2 * data.tokens
    assert first.startswith('"""')


def test_a_given_tokenizer_without_eod_and_cut_documents(
    tmp_path: Path, source: Path, prepared: PreparedData
) -> None:
    model = prepared.path / "tokenizer.model"
    whole = prepare(source, tmp_path / "whole", tokenizer=str(model), append_eod=False)
    cut = prepare(
        source, tmp_path / "cut", tokenizer=str(model), append_eod=False, max_document_tokens=10
    )
    assert (cut.path / "tokenizer.model").read_bytes() == model.read_bytes()
    assert [cut.tokenizer.decode(document) for document in stored(whole)] == TEXTS[:20]
    assert [*chain(*stored(cut))] == [*chain(*stored(whole))]
    assert {len(document) for document in stored(cut)} <= set(range(1, 11))
    assert cut.documents == len(stored(cut)) > whole.documents == 20


def test_a_text_without_a_token_is_no_document(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Tokenizer.encode_many

    def normalised(self: Tokenizer, texts: list[str], threads: int) -> list[list[int]]:
        """As tokenizers do that drop white space."""
        found = encode(self, texts, threads)
        return [ids if text.strip() else [] for ids, text in zip(found, texts, strict=True)]

    monkeypatch.setattr(Tokenizer, "encode_many", normalised)
    tokenizer = prepare(source, tmp_path / "first", vocab_size=300).path / "tokenizer.model"
    (tmp_path / "a.jsonl").write_text('{"text": "   "}\n{"text": "some words"}\n')
    made = prepare(
        tmp_path / "a.jsonl", tmp_path / "out", tokenizer=str(tokenizer), append_eod=False
    )
    assert made.documents == 1
    assert made.tokens > 0


def test_large_vocabularies_are_stored_in_four_bytes(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_dhellam.data.tokenizer.Tokenizer.vocab_size", 70_000)
    data = prepare(source, tmp_path / "out", **OPTIONS)
    assert (data.path / "data.bin").stat().st_size == 4 * data.tokens


def test_a_finished_output_is_reused(tmp_path: Path, source: Path) -> None:
    first = prepare(source, tmp_path / "out", **OPTIONS)
    time = (first.path / "data.bin").stat().st_mtime_ns
    again = prepare(source, tmp_path / "out", **OPTIONS)
    assert (first.reused, again.reused) == (False, True)
    assert (first.path / "data.bin").stat().st_mtime_ns == time


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"vocab_size": 301}, "vocab_size=300, now vocab_size=301"),
        ({"append_eod": False}, "append_eod=True, now append_eod=False"),
        ({"max_document_tokens": 5}, "max_document_tokens=None, now max_document_tokens=5"),
        ({"json_key": "other"}, "json_key=text, now json_key=other"),
    ],
)
def test_a_different_option_is_named_and_not_overwritten(
    tmp_path: Path, source: Path, change: dict[str, Any], field: str
) -> None:
    before = prepare(source, tmp_path / "out", **OPTIONS)
    with pytest.raises(ValueError, match=field + r"\. Pass --overwrite"):
        prepare(source, tmp_path / "out", **{**OPTIONS, **change})
    assert PreparedData.load(tmp_path / "out").fingerprint == before.fingerprint


def test_a_changed_source_is_noticed_and_overwrite_replaces(tmp_path: Path, source: Path) -> None:
    before = prepare(source, tmp_path / "out", **OPTIONS)
    with source.open("a") as file:
        file.write('{"text": "one more"}\n')
    with pytest.raises(ValueError, match=r"was prepared with source_bytes="):
        prepare(source, tmp_path / "out", **OPTIONS)
    after = prepare(source, tmp_path / "out", overwrite=True, **OPTIONS)
    assert after.documents == before.documents + 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "source.jsonl"]


def test_an_interrupted_run_leaves_nothing(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = 0
    add_document = IndexedDatasetBuilder.add_document

    def interrupt(*args: Any, **kwargs: Any) -> None:
        nonlocal written
        written += 1
        if written == 10:
            raise KeyboardInterrupt
        add_document(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(IndexedDatasetBuilder, "add_document", interrupt)
        prepare(source, tmp_path / "out", **OPTIONS)
    assert written == 10
    assert [file.name for file in tmp_path.iterdir()] == ["source.jsonl"]
    assert prepare(source, tmp_path / "out", **OPTIONS).documents == 20


def test_an_interrupted_overwrite_keeps_the_old(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = prepare(source, tmp_path / "out", **OPTIONS)

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_module, "_write_meta", interrupt)
        prepare(source, tmp_path / "out", overwrite=True, **OPTIONS)
    assert PreparedData.load(tmp_path / "out") == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "source.jsonl"]


def test_a_killed_runs_leftover_is_never_trusted(tmp_path: Path, source: Path) -> None:
    leftover = tmp_path / "out"
    leftover.mkdir()
    (leftover / "data.bin").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"exists and is not a prepared dataset"):
        prepare(source, leftover, overwrite=True, **OPTIONS)
    with pytest.raises(ValueError, match=r"is not a prepared dataset .*dhellam data prepare"):
        PreparedData.load(leftover)


def test_a_damaged_output_is_refused_and_overwritten(tmp_path: Path, source: Path) -> None:
    data = prepare(source, tmp_path / "out", **OPTIONS)
    (data.path / "data.bin").write_bytes(b"short")
    with pytest.raises(ValueError, match=r"data\.bin has 5 bytes, but meta\.json says \d+ bytes"):
        prepare(source, data.path, **OPTIONS)
    assert prepare(source, data.path, overwrite=True, **OPTIONS).tokens == data.tokens
    (data.path / "meta.json").write_text("{")
    with pytest.raises(ValueError, match=r"meta\.json is not a description of format 1"):
        PreparedData.load(data.path)
    (data.path / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match=r"also holds thesis\.tex, which --overwrite would"):
        prepare(source, data.path, overwrite=True, **OPTIONS)


def test_bad_options(tmp_path: Path, source: Path, prepared: PreparedData) -> None:
    model = str(prepared.path / "tokenizer.model")
    with pytest.raises(ValueError, match=r"vocab_size=77, but tokenizer=.* has 300 ids"):
        prepare(source, tmp_path / "out", tokenizer=model, vocab_size=77)
    with pytest.raises(ValueError, match=r"workers=-1 is negative"):
        PrepareConfig(["a"], "b", workers=-1)
    with pytest.raises(ValueError, match=r"max_document_tokens=0 is not positive"):
        PrepareConfig(["a"], "b", max_document_tokens=0)
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_without_eod_is_refused(
    tmp_path: Path, source: Path, prepared: PreparedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_dhellam.data.tokenizer.Tokenizer.eod", -1)
    model = str(prepared.path / "tokenizer.model")
    with pytest.raises(ValueError, match=r"has no end-of-document id \(eos\).*--append_eod=false"):
        prepare(source, tmp_path / "out", tokenizer=model)


def test_staging_yields_to_another_process(tmp_path: Path) -> None:
    target = tmp_path / "target"
    with staged_directory(target) as folder:
        (folder / "mine").touch()
        target.mkdir()
        (target / "theirs").touch()
    assert [file.name for file in target.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [target]


def test_an_interrupted_file_keeps_its_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    write_atomically(file, b"old")

    def fail(handle: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_is_said_in_a_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    for number in range(1000):
        (source / f"{number}.txt").write_text(f"{number} quick brown foxes\n" * 20)
    words = ["prepare", "--source", str(source), "--output", str(target / "data")]
    with full_disk(target, 50_000):
        assert data_command([*words, "--vocab_size", "300", "--progress", "false"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "dhellam data prepare: error: data.bin in " in line
    assert "No space left on device: " in line
    assert " were written, about " in line and " more are needed, and " in line
    assert not list(target.iterdir())
