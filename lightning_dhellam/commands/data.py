"""`dhellam data prepare`: from text to a dataset to train on."""

import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from lightning_dhellam.data.config import PrepareConfig
from lightning_dhellam.files import WriteError

if TYPE_CHECKING:
    from lightning_dhellam.data.prepared import PreparedData

_USAGE = """\
usage: dhellam data prepare --source SOURCE --output DIR [options]

Make data to train on: text -> sentencepiece tokenizer -> Megatron indexed dataset.

commands:
  prepare   make a dataset directory; `dhellam data prepare --help` lists its options

example:
  dhellam data prepare --source stdlib --output data/stdlib --vocab_size 4096
"""


def data_command(argv: Sequence[str]) -> int:
    """Run `dhellam data <argv>`. Returns the exit code: 0, or 2 for a user's mistake."""
    if argv and argv[0] == "prepare":
        return prepare_command(argv[1:])
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_USAGE, end="")
        return 0 if argv else 2
    print(f"dhellam data: error: unknown command {argv[0]!r}. Use: prepare.", file=sys.stderr)
    return 2


def prepare_command(argv: Sequence[str]) -> int:
    """Run `dhellam data prepare <argv>`. Returns the exit code: 2 for a user's mistake, 1 if there
    is no room for the data, or else 0.
    """
    parser = _prepare_parser()
    try:
        options = vars(parser.parse_args(_spelled_out(argv)))
        prepared = _prepare(options)
    except (ValueError, ArgumentError) as error:
        print(f"dhellam data prepare: error: {_one_line(error, parser)}", file=sys.stderr)
        return 2
    except WriteError as error:
        print(f"dhellam data prepare: error: {_one_line(error, parser)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("dhellam data prepare: interrupted; nothing was written.", file=sys.stderr)
        return 130
    print(_summary(prepared))
    return 0


def _prepare(options: dict[str, Any]) -> "PreparedData":
    from lightning_dhellam.data.prepare import prepare

    return prepare(**options)


def _prepare_parser() -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog="dhellam data prepare",
        description="Make a dataset directory from text. It appears whole or not at all, and a"
        " finished one is reused when nothing changed.",
        exit_on_error=False,
        allow_abbrev=False,  # what was meant is said instead
    )
    parser.add_class_arguments(PrepareConfig)
    return parser


def _spelled_out(argv: Sequence[str]) -> list[str]:
    """Let options be written with hyphens, and switches without a value."""
    switches = {f"--{field.name}" for field in fields(PrepareConfig) if field.type is bool}
    words = []
    for position, word in enumerate(argv):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            name = "--" + name[2:].replace("-", "_")
            following = argv[position + 1] if position + 1 < len(argv) else "--"
            if name in switches and not equals and following.lower() not in ("true", "false"):
                equals, value = "=", "true"
            word = name + equals + value
        words.append(word)
    return _with_all_sources(words)


def _with_all_sources(words: Sequence[str]) -> list[str]:
    """Let `--source` be given several times: the parser would keep the last one only."""
    kept: list[str] = []
    sources: list[str] = []
    waiting = iter(words)
    for word in waiting:
        name, equals, value = word.partition("=")
        if name == "--source":
            value = value if equals else next(waiting, "")
            sources += json.loads(value) if value.startswith("[") else [value]
        else:
            kept.append(word)
    return [f"--source={json.dumps(sources)}", *kept] if sources else kept


def _summary(prepared: "PreparedData") -> str:
    state = "already prepared" if prepared.reused else "prepared"
    return (
        f"{prepared.path}: {state} from {prepared.source}: {prepared.documents:,} documents,"
        f" {prepared.tokens:,} tokens, vocabulary {prepared.vocab_size:,}"
    )


def _one_line(error: Exception, parser: ArgumentParser) -> str:
    if not isinstance(error, ArgumentError) or "are required" in str(error):
        return " ".join(str(error).split())
    from lightning_dhellam.commands.mistakes import one_line

    return one_line(str(error), [action.dest for action in parser._actions], "prepare")
