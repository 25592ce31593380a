"""Whether a command would be taken: by the parsers that it would meet, without carrying it out."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
from collections.abc import Sequence

import pytest
from torch.distributed import run

from lightning_dhellam.bench.command import BENCHMARKS
from lightning_dhellam.commands.main import BY_NAME, main
from tests.docs.pages import ROOT

LOOPS = BY_NAME["fit"].names
_PLACEHOLDER = re.compile(r"[A-Z]+|…|\.\.\.")


def check(words: Sequence[str]) -> None:
    """Fail unless a command exists and its options do, with values they take."""
    match list(words):
        case ["dhellam", *rest]:
            _ours(rest)
        case ["make", *_]:
            done = subprocess.run([*words, "-n"], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        case ["torchrun", *_]:
            run.get_args_parser().parse_args(list(words[1:]))
        case ["pip", "install", *what]:
            _installable([word for word in what if not word.startswith("-")])
        case _:
            pytest.fail(f"{' '.join(words)}: nothing here knows how to check this command")


def _ours(words: list[str]) -> None:
    command, *options = words
    if command in LOOPS and "--config" in options:
        _taken([command, *options, *([] if "--print_config" in options else ["--print_config"])])
    elif command == "bench" and options:
        _benchmark(*options)
    else:
        _known(words)


def _taken(words: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()), pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0


def _benchmark(name: str, *options: str) -> None:
    if name == "--help" or _PLACEHOLDER.fullmatch(name):
        return
    BENCHMARKS[name].parse(f"dhellam bench {name}", options)


def _known(words: list[str]) -> None:
    """That a command answers `--help`, and has the options that are named."""
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    before = [word for word in words if not word.startswith("-")]
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        names = before[:2] if words[0] in ("data", "plan") else before[:1]
        assert main([*names, "--help"]) == 0
    if words[0] in LOOPS:
        return  # whose options LightningCLI takes from a recipe's classes
    for option in options:
        taken = option in ("--help", "--version") or re.search(rf"{option}\b", said.getvalue())
        assert taken or words[0] == "search", f"{' '.join(words)}: no option {option}"


def _installable(what: list[str]) -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in what:
        named = re.fullmatch(r"(?:lightning-dhellam|\.)(?:\[([\w,-]+)\])?", word)
        assert named, f"{word} is not this package"
        asked = set(filter(None, (named[1] or "").split(",")))
        assert asked <= set(extras["optional-dependencies"]), word
