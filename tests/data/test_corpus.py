import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_dhellam.data.corpus import open_corpus


def texts(source: Path | str, json_key: str = "text") -> list[str]:
    return [document.text for document in open_corpus(source, json_key).documents()]


def test_a_text_file_is_one_document_to_the_byte(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("  line\r\n\tübel\n\n".encode())
    (document,) = open_corpus(file).documents()
    assert document == ("  line\r\n\tübel\n\n", file.stat().st_size)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "there"}\n')
    assert texts(tmp_path) == ["hello", "there"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_jsonl_line_is_one_document(tmp_path: Path, name: str) -> None:
    lines = [json.dumps({"body": text}) for text in ["one\n", "", "zwölf"]]
    (tmp_path / name).write_text("\n\n".join(lines))
    assert texts(tmp_path / name, "body") == ["one\n", "zwölf"]


def test_a_folder_is_read_recursively_in_path_order(tmp_path: Path) -> None:
    for name in ["b/z.md", "b.txt", "a/y.py", "a.jsonl", "c.bin", "config.json", ".git/x.txt"]:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text('{"text": "a.jsonl"}' if name == "a.jsonl" else name)
    assert texts(tmp_path) == ["a.jsonl", "a/y.py", "b.txt", "b/z.md"]


def test_the_standard_library_is_some_megabytes_without_its_tests() -> None:
    corpus = open_corpus("stdlib")
    names = [file.name for file in corpus.files]
    assert corpus.size > 5e6
    assert names == sorted(names)
    assert {"dataclasses.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & {*name.split("/")}]
    assert sum(document.source_bytes for document in corpus.documents()) == corpus.size


def test_the_digest_follows_content_names_and_times(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("a")
    os.utime(file, ns=(1, 1))
    digests = [open_corpus(tmp_path).digest()]
    os.utime(file, ns=(1, 2))
    digests.append(open_corpus(tmp_path).digest())
    file.rename(tmp_path / "b.txt")
    digests.append(open_corpus(tmp_path).digest())
    assert len(set(digests)) == 3
    assert open_corpus(tmp_path).digest() == digests[-1]


def test_errors_before_reading(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"source=.*nowhere does not exist\. Give .*stdlib"):
        open_corpus(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is empty: the folder has no file with a known suffix"):
        open_corpus(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"is empty: its 1 file\(s\) have 0 bytes"):
        open_corpus(tmp_path)
    (tmp_path / "empty.txt").unlink()
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"dangling\.txt cannot be read \(No such file"):
        open_corpus(tmp_path)


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")
    corpus = open_corpus(tmp_path)

    def refuse(path: Path, mode: str) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"a\.txt cannot be read \(Permission denied\)"):
        list(corpus.documents())


def test_not_utf8_names_file_and_offset(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"four\xff")
    with pytest.raises(ValueError, match=r"bad\.txt is not UTF-8: byte 0xff at offset 4 "):
        texts(tmp_path / "bad.txt")
    (tmp_path / "bad.txt").write_bytes(b"\xef\xbb\xbfx\xff")
    with pytest.raises(ValueError, match=r"at offset 4 "):
        texts(tmp_path / "bad.txt")
    (tmp_path / "bad.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xe4"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl is not UTF-8: byte 0xe4 at offset 24 "):
        texts(tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", r"bad\.jsonl:2 is not JSON: .* at column 2"),
        ('["a"]', r"bad\.jsonl:2 is a JSON list; each line must be an object"),
        ('{"body": "a"}', r"bad\.jsonl:2 has no key 'text'; its keys are \['body'\].*--json_key"),
        ('{"text": 7}', r"bad\.jsonl:2 has text=7, which is not a string"),
        (r'{"text": "a\ud800"}', r"bad\.jsonl:2 holds a lone surrogate \\ud800 at character 1"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        texts(tmp_path / "bad.jsonl")


def test_documents_without_text_are_refused_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(ValueError, match=r"holds no text: 1 file\(s\) were read"):
        texts(tmp_path)


def test_all_sources_are_read_in_the_order_given(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    sources = [tmp_path / "two", tmp_path / "one"]
    assert [document.text for document in open_corpus(sources).documents()] == ["two", "one"]
    with pytest.raises(ValueError, match=r"/one is given twice"):
        open_corpus([*sources, tmp_path / "one"])
    with pytest.raises(ValueError, match=r"source=\[\] is empty"):
        open_corpus([])


def test_compressed_files_are_read(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(1000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("übel".encode()))
    corpus = open_corpus(tmp_path)
    documents = list(corpus.documents())
    assert [d.text for d in documents] == [*(f"line {n}" for n in range(1000)), "übel"]
    # What the progress bar adds up to.
    assert sum(d.source_bytes for d in documents) <= corpus.size
    assert sum(d.source_bytes for d in documents) > 0.5 * corpus.size


def test_rows_of_a_parquet_file_are_documents(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = {"body": [f"row {n}" for n in range(70_000)], "id": list(range(70_000))}
    parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet", row_group_size=1000)
    assert texts(tmp_path, "body") == rows["body"]
    with pytest.raises(ValueError, match=r"has no column 'text'; its columns are \['body', 'id'\]"):
        texts(tmp_path)
    with pytest.raises(ValueError, match=r"a\.parquet: row 1 has id=0, which is not a string"):
        texts(tmp_path, "id")


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("a.jsonl.gz", lambda: gzip.compress(b'{"text": "a"}' * 1000)[:-20]),
        ("a.txt.gz", lambda: b"not compressed"),
        ("a.parquet", lambda: b"not parquet"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: Callable[[], bytes]) -> None:
    (tmp_path / name).write_bytes(damage())
    with pytest.raises(ValueError, match=rf"{name} cannot be read \(.*\)\. If it is damaged"):
        texts(tmp_path)
