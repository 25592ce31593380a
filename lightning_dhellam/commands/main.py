"""The `dhellam` command: finds what its first word asks for, and says mistakes in one line."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from lightning_dhellam import __version__
from lightning_dhellam.failures import fold, is_ours, was_said
from lightning_dhellam.files import WriteError

USAGE = """\
usage: dhellam COMMAND [options]

Train large language models under PyTorch Lightning with two micro-batches in flight.

  demo                        prepare data and train a small Llama, on this machine
  data prepare                text -> tokenizer -> Megatron indexed dataset
  convert SOURCE TARGET       a folder of Hugging Face -> a checkpoint, and the other way round
  checkpoint show FOLDER      what a checkpoint is, and whether it is whole
  search --config FILE        find the best plan of a recipe, without training it
  plan show FILE              print the plans of a plan file
  plan schedule               print the visits of every stage of the folded pipeline
  simulate                    play pipeline schedules on measured times, and compare them
  bench NAME                  measure this machine; `dhellam bench --help` lists what
  recipes                     the recipes that ship with the package, and copies of them
  clusters                    the clusters that ship: what `emulate` and `--cluster` take
  fit|validate|test|predict   LightningCLI: --config FILE or recipe name, then any override

`dhellam COMMAND --help` says more; `dhellam --version` says which version this is.
"""
LOOPS = ("fit", "validate", "test", "predict")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 2 for a user's mistake, 1 for a full disk."""
    words = list(sys.argv[1:] if argv is None else argv)
    command = words[0] if words else "--help"
    if command in ("-h", "--help", "help"):
        print(USAGE, end="")
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


def _run(command: str, words: list[str]) -> int:
    if command == "data":
        from lightning_dhellam.commands.data import data_command

        return data_command(words)
    if command == "convert":
        from lightning_dhellam.commands.convert import convert_command

        return convert_command(words)
    if command == "checkpoint":
        from lightning_dhellam.commands.checkpoint import checkpoint_command

        return checkpoint_command(words)
    if command == "search":
        from lightning_dhellam.commands.search import search_command

        return search_command(words)
    if command == "plan":
        from lightning_dhellam.commands.plan import plan_command

        return plan_command(words)
    if command == "simulate":
        from lightning_dhellam.commands.simulate import simulate_command

        return simulate_command(words)
    if command == "bench":
        from lightning_dhellam.bench.command import bench_command

        return bench_command(words)
    if command == "recipes":
        from lightning_dhellam import recipes
        from lightning_dhellam.commands.shelf import shelf_command

        return shelf_command(command, recipes.SHELF, words)
    if command == "clusters":
        from lightning_dhellam.commands.shelf import shelf_command
        from lightning_dhellam.recipes import clusters

        return shelf_command(command, clusters.SHELF, words)
    if command == "demo":
        from lightning_dhellam.commands.demo import demo_command

        return demo_command(words)
    if command in LOOPS:
        from lightning_dhellam.commands.fit import run_lightning

        run_lightning([command, *words])
        return 0
    known = (
        "demo",
        "data",
        "convert",
        "checkpoint",
        "search",
        "plan",
        "simulate",
        "bench",
        "recipes",
        "clusters",
        *LOOPS,
    )
    raise ValueError(f"unknown command '{command}': use {', '.join(known)}")


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
