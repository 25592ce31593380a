"""The `dhellam` command: finds what its first word asks for, and says mistakes in one line."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import NamedTuple

from lightning_dhellam import __version__
from lightning_dhellam.failures import fold, is_ours, was_said
from lightning_dhellam.files import WriteError
from lightning_dhellam.importing import uncollected


class Command(NamedTuple):
    """A row of the table of commands.

    Attributes:
        names: the first words that mean it.
        uses: for each use what follows the name, and what it does.
        function: `module:function`, loaded when it is asked for and no sooner. It takes the words
            that follow, and returns the exit code.
        takes_name: whether the function takes the name as well, before the words.
    """

    names: tuple[str, ...]
    uses: tuple[tuple[str, str], ...]
    function: str
    takes_name: bool = False

    def run(self, name: str, words: list[str]) -> int:
        """Carry it out. Returns the exit code."""
        module, _, function = self.function.partition(":")
        with uncollected():
            loaded = getattr(import_module(f"lightning_dhellam.{module}"), function)
        return loaded([name, *words] if self.takes_name else words)


COMMANDS = (
    Command(
        ("demo",),
        (("", "prepare data and train a small Llama, on this machine"),),
        "commands.demo:demo_command",
    ),
    Command(
        ("data",),
        (("prepare", "text -> tokenizer -> Megatron indexed dataset"),),
        "commands.data:data_command",
    ),
    Command(
        ("convert",),
        (
            (
                "SOURCE TARGET",
                "a folder of Hugging Face <-> a checkpoint <-> Lightning's file",
            ),
        ),
        "commands.convert:convert_command",
    ),
    Command(
        ("checkpoint",),
        (("show FOLDER", "what a checkpoint is, and whether it is whole"),),
        "commands.checkpoint:checkpoint_command",
    ),
    Command(
        ("search",),
        (("--config FILE", "find the best plan of a recipe, without training it"),),
        "commands.search:search_command",
    ),
    Command(
        ("plan",),
        (
            ("show FILE", "print the plans of a plan file"),
            ("schedule", "print the visits of every stage of the folded pipeline"),
            ("memory --config FILE", "predict what every rank of a run takes"),
        ),
        "commands.plan:plan_command",
    ),
    Command(
        ("simulate",),
        (("", "play pipeline schedules on measured times, and compare them"),),
        "commands.simulate:simulate_command",
    ),
    Command(
        ("bench",),
        (("NAME", "measure this machine; `dhellam bench --help` lists what"),),
        "bench.command:bench_command",
    ),
    Command(
        ("recipes",),
        (("", "the recipes that ship with the package, and copies of them"),),
        "commands.shelf:shelf_command",
        takes_name=True,
    ),
    Command(
        ("clusters",),
        (("", "the clusters that ship: what `emulate` and `--cluster` take"),),
        "commands.shelf:shelf_command",
        takes_name=True,
    ),
    Command(
        ("predict",),
        (
            ("--cluster NAME", "what a step of a recipe takes on a cluster"),
            ("", "LightningCLI, as `fit`: what a model predicts"),
        ),
        "commands.predict:predict_command",
        takes_name=True,
    ),
    Command(
        ("advise",),
        (("--cluster NAME", "how a model is best spread, and the recipe of that"),),
        "commands.advise:advise_command",
    ),
    Command(
        ("compare",),
        (("FILE", "predicted steps beside those of `dhellam bench several`"),),
        "commands.compare:compare_command",
    ),
    Command(
        ("fit", "validate", "test"),
        (("", "LightningCLI: --config FILE or recipe name, then any override"),),
        "commands.fit:loop_command",
        takes_name=True,
    ),
)
BY_NAME: Mapping[str, Command] = {name: row for row in COMMANDS for name in row.names}


def usage() -> str:
    """Return what `dhellam --help` prints."""
    rows = [
        (f"{'|'.join(command.names)} {words}".rstrip(), summary)
        for command in COMMANDS
        for words, summary in command.uses
    ]
    width = max(len(words) for words, _ in rows)
    return (
        "usage: dhellam COMMAND [options]\n\n"
        "Train large language models under PyTorch Lightning with two micro-batches in flight.\n\n"
        + "".join(f"  {words:<{width}}  {summary}\n" for words, summary in rows)
        + "\n`dhellam COMMAND --help` says more; `dhellam --version` says which version this is.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 2 for a user's mistake, 1 for a full disk."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words[0] if words else "--help"
    if command in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0 if words else 2
    if command == "--version":
        print(f"dhellam {__version__}")
        return 0
    try:
        return _run(command, words[1:])
    except WriteError as error:
        if not was_said(error):
            print(f"dhellam {command}: error: {error}", file=sys.stderr)
        return 1
    except Exception as error:
        mistake = _mistake(error)
        if mistake is not None:
            if not was_said(error):
                line = " ".join(str(mistake).split())
                print(f"dhellam {command}: error: {line}", file=sys.stderr)
            return 2
        fold(error)
        raise


def _run(name: str, words: list[str]) -> int:
    if name not in BY_NAME:
        raise ValueError(f"unknown command '{name}': use {', '.join(BY_NAME)}")
    return BY_NAME[name].run(name, words)


def _mistake(error: BaseException | None) -> BaseException | None:
    """The user's mistake behind an error: what this package raised, which needs no traceback, or
    what Lightning calls one.

    jsonargparse wraps what a constructor raises, so the causes are searched.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))  # an error that is raised anew may be among its own causes
        frames = traceback.extract_tb(error.__traceback__)
        if isinstance(error, ValueError) and frames and is_ours(frames[-1].filename):
            return error
        if type(error).__name__ == "MisconfigurationException":
            return error
        error = error.__cause__ or error.__context__
    return None
