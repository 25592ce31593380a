"""Recipes and clusters: listed with what they describe, copied, never over what is there."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest

from lightning_dhellam import recipes
from lightning_dhellam.bench.command import BENCHMARKS
from lightning_dhellam.commands.main import main
from lightning_dhellam.recipes import clusters
from lightning_dhellam.recipes.shelf import Shelf

SHELVES = {"recipes": recipes.SHELF, "clusters": clusters.SHELF}


@pytest.fixture(params=sorted(SHELVES))
def word(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def shelf(word: str) -> Shelf:
    return SHELVES[word]


def test_the_list_has_a_sentence_for_each(
    word: str, shelf: Shelf, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word]) == 0
    rows = [line.split("  ", 1) for line in capsys.readouterr().out.splitlines()]
    assert [name for name, _ in rows] == shelf.names()
    for name, sentence in rows:
        sentence = sentence.strip()
        assert shelf.path(name).read_text().startswith(f"# {sentence}\n")
        assert sentence.endswith(".") and len(sentence.split()) > 4, sentence


def test_every_one_can_be_copied_and_nothing_is_overwritten(
    word: str,
    shelf: Shelf,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in shelf.names():
        assert main([word, "copy", name]) == 0
        assert capsys.readouterr().out == f"written to {name}.yaml\n"
        assert Path(f"{name}.yaml").read_bytes() == shelf.path(name).read_bytes()
    Path(f"{name}.yaml").write_text("mine")
    assert main([word, "copy", name]) == 2
    assert f"{name}.yaml exists, and is not overwritten" in capsys.readouterr().err
    assert Path(f"{name}.yaml").read_text() == "mine"
    assert main([word, "copy", f"{name}.yaml", "new/here.yaml"]) == 0
    assert Path("new/here.yaml").read_bytes() == shelf.path(name).read_bytes()


def test_a_copy_is_taken_where_its_name_was() -> None:
    from lightning_dhellam.parallel import Cluster

    assert Cluster.load(str(clusters.find("h800-node"))).links == Cluster.load("h800-node").links


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["copy"], "use 'dhellam recipes' to see them or 'dhellam recipes copy NAME [FILE]'"),
        (["show", "llama-tiny-2cpu"], "recipes show llama-tiny-2cpu: use 'dhellam recipes'"),
        (["copy", "a", "b", "c"], "recipes copy a b c: use 'dhellam recipes'"),
        (["copy", "llama-tiny-2gpu"], "did you mean 'llama-tiny-2cpu'?"),
        (["copy", "llama-tiny-2cpu", "mine"], "mine must end in .yaml"),
        (["copy", "llama-tiny-2cpu", "a.yaml"], "a.yaml is a folder, and a file is written"),
        (["copy", "llama-tiny-2cpu", "b/c.yaml"], "b/c.yaml: b is not a folder"),
    ],
)
def test_what_cannot_be_copied_is_one_line(
    words: list[str],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").mkdir()
    Path("b").write_text("mine")
    assert main(["recipes", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dhellam recipes: error: ") and sentence in line


@pytest.mark.parametrize("words", [["--help"], ["copy", "-h"]])
def test_help_says_what_they_are_for(
    word: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word, *words]) == 0
    assert f"dhellam {word} copy NAME [FILE]" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    ["demo", "data prepare", "search", "plan schedule", "simulate"]
    + [f"bench {name}" for name in BENCHMARKS],
)
def test_every_option_is_spelt_with_underscores(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As those of LightningCLI are, so that nobody has to try both."""
    with contextlib.suppress(SystemExit):
        main([*words.split(), "--help"])
    said = capsys.readouterr().out
    assert "--output" in said or "--folder" in said
    assert re.findall(r"--\w+-[\w-]+", said) == []
