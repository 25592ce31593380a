"""What the README and the guides say can be done, can be done."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lightning_dhellam import recipes
from tests.docs import parsing
from tests.docs.conftest import Workshop
from tests.docs.pages import GUIDES, PAGES, README, ROOT, Block, blocks, inline_commands, name

PREPARE = "dhellam data prepare --source stdlib --vocab_size 4096 --output data/stdlib"
DATA = shlex.split(PREPARE)
WITH_COMMANDS = [page for page in PAGES if blocks(page, "sh")]


def shell(page: Path) -> list[Block]:
    return [block for block in blocks(page, "sh") if block.reason is None]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name)
def test_every_command_of_a_page_works_in_the_order_given(
    page: Path, workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    if any("fit" in words for block in shell(page) for words in block.commands):
        workshop.run(DATA, capsys)
    for block in shell(page):
        for words in block.commands:
            if words[0] == "dhellam":
                workshop.run(words, capsys)
            else:
                parsing.check(words)  # pip and make, which install


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name)
def test_every_command_that_is_not_run_would_be_taken(page: Path) -> None:
    for block in blocks(page, "sh"):
        for words in block.commands if block.reason else ():
            parsing.check(words)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "benchmarks/README.md"], ids=name)
def test_every_command_in_running_text_exists(page: Path) -> None:
    for words in inline_commands(page):
        parsing.check(words)


def test_what_the_commands_print(workshop: Workshop, capsys: pytest.CaptureFixture[str]) -> None:
    """The numbers and files that the guides promise are there."""

    def shown(command: str) -> list[str]:
        (words,) = {
            tuple(words)
            for page in (README, *GUIDES)
            for block in shell(page)
            for words in block.commands
            if " ".join(words).startswith(command)
        }
        return list(words)

    listed = workshop.run(["dhellam", "recipes"], capsys)
    assert [line.split()[0] for line in listed.splitlines()] == recipes.names()
    assert "vocabulary 4,096" in workshop.run(DATA, capsys)
    found = workshop.run(shown("dhellam search"), capsys)
    assert re.search(r"\* installed: '\w+'", found)
    assert len(re.findall(r"^use it with .* ?runs/search/plan\.json$", found, re.MULTILINE)) == 1
    plans = workshop.run(shown("dhellam plan show"), capsys)
    assert "forward transformer, backward transformer" in plans
    simulated = workshop.run(shown("dhellam simulate"), capsys)
    assert re.search(r"^fold +[\d.]+ s ", simulated, re.MULTILINE)
    assert "stage 3, chunks 3 and 4" in workshop.run(shown("dhellam plan schedule"), capsys)
    files = ("simulate/pipelines.png", "fold.png", "search/timeline.png", "search/exposed.png")
    assert [file for file in files if not (workshop.folder / "runs" / file).is_file()] == []
    guide = next(page for page in GUIDES if page.name == "plans.md")
    (fit,) = (words for block in shell(guide) for words in block.commands if "fit" in words)
    summary = workshop.run(fit, capsys)
    assert re.search(r"loss +8\.\d+ -> \d\.\d+ in 10 steps", summary)
    assert re.search(r"plan +runs/search/plan.json, tensor parallel 2, data parallel 1", summary)


def test_the_two_commands_are_those_of_the_makefile() -> None:
    first, *_ = blocks(README, "sh")
    assert first.commands == [["make", "demo"], ["make", "test"]]
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo:.*\n\t.*dhellam demo$", makefile, re.MULTILINE)
    assert re.search(r"^test:.*\n\t.*pytest", makefile, re.MULTILINE)


def test_git_ignores_what_the_commands_write() -> None:
    shown = "".join(block.text for page in (README, *GUIDES) for block in blocks(page, "sh"))
    folders = {f"/{Path(output).parts[0]}/" for output in re.findall(r"--output (\S+)", shown)}
    assert {"/data/", "/runs/"} <= folders <= set((ROOT / ".gitignore").read_text().splitlines())
