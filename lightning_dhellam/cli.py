"""The `dhellam` command."""

from __future__ import annotations

import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_dhellam import __version__

if TYPE_CHECKING:
    import lightning.pytorch as pl

USAGE = """\
usage: dhellam COMMAND [options]

Train large language models under PyTorch Lightning with two micro-batches in flight.

  demo                        prepare data and train a small Llama, on this machine
  data prepare                text -> tokenizer -> Megatron indexed dataset
  search --config FILE        find the best plan of a recipe, without training it
  plan show FILE              print the plans of a plan file
  plan schedule               print the passes of every stage of the folded pipeline
  simulate                    play pipeline schedules on measured times, and compare them
  bench NAME                  measure this machine; `dhellam bench --help` lists what
  recipes                     list the recipes that ship with the package
  clusters                    list the clusters that ship: what `emulate` and `--cluster` take
  fit|validate|test|predict   LightningCLI: --config FILE or recipe name, then any override

`dhellam COMMAND --help` says more; `dhellam --version` says which version this is.
"""
PLAN_USAGE = """\
usage: dhellam plan show FILE
       dhellam plan schedule --stages P --micro-batches M [--output FILE]

  show       print the plans of a plan file, such as that of a search
  schedule   print the passes of every stage of the folded pipeline

`dhellam plan schedule --help` says more.
"""
LOOPS = ("fit", "validate", "test", "predict")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code: 2 for a mistake in the configuration."""
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
    except ValueError as error:
        mistake = _mistake(error)
        if mistake is None:
            raise
        print(f"dhellam {command}: error: {mistake}", file=sys.stderr)
        return 2


def _run(command: str, words: list[str]) -> int:
    if command == "data":
        from lightning_dhellam.data.cli import data_command

        return data_command(words)
    if command == "search":
        from lightning_dhellam.searching import search_command

        return search_command(words)
    if command == "plan":
        return plan_command(words)
    if command == "simulate":
        from lightning_dhellam.search.command import simulate_command

        return simulate_command(words)
    if command == "bench":
        from lightning_dhellam.bench import bench_command

        return bench_command(words)
    if command == "recipes":
        from lightning_dhellam import recipes

        print("\n".join(recipes.names()))
        return 0
    if command == "clusters":
        from lightning_dhellam.recipes import clusters

        print("\n".join(clusters.names()))
        return 0
    if command == "demo":
        from lightning_dhellam.demo import demo_command

        return demo_command(words)
    if command in LOOPS:
        run_lightning([command, *words])
        return 0
    known = ("demo", "data", "search", "plan", "simulate", "bench", "recipes", "clusters", *LOOPS)
    raise ValueError(f"unknown command '{command}': use {', '.join(known)}")


def plan_command(words: list[str]) -> int:
    """Print every plan of a plan file as a table, or the schedule of a pipeline."""
    if words[:1] == ["schedule"]:
        from lightning_dhellam.search.command import schedule_command

        return schedule_command(words[1:])
    if words in (["-h"], ["--help"], ["show", "-h"], ["show", "--help"]):
        print(PLAN_USAGE, end="")
        return 0
    if len(words) != 2 or words[0] != "show":
        raise ValueError(
            f"plan {' '.join(words)}: use 'dhellam plan show FILE' or 'dhellam plan schedule"
            " --stages P --micro-batches M'"
        )
    from lightning_dhellam.search.planfile import PlanFile

    print(PlanFile.load(words[1]))
    return 0


def run_lightning(words: list[str], save_config: bool = True) -> pl.Trainer:
    """LightningCLI with Lightning's subcommands: `fit --config recipe --trainer.max_steps 10`.

    `save_config` keeps the configuration beside the logs, as Lightning does. Gives the trainer
    when it is done.

    Raises:
        ValueError: a mistake in the configuration.
    """
    with warnings.catch_warnings():
        # On import Megatron-core warns about GPU extensions that are optional here.
        warnings.simplefilter("ignore", UserWarning)
        from lightning.pytorch import Callback, LightningDataModule, LightningModule
        from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
        from lightning.pytorch.strategies import Strategy

        import lightning_dhellam.strategy  # noqa: F401  registers the strategy by name
    # Lightning suspects a mistake when arguments are given that are not the process's own.
    warnings.filterwarnings("ignore", "LightningCLI's args parameter", UserWarning)

    class CLI(LightningCLI):
        def instantiate_classes(self) -> None:
            # Where a string or nothing is allowed as well as an object, jsonargparse puts what the
            # constructor raised into the text of an error of its own, whose cause is another.
            raised: list[ValueError] = []

            def construct(kind: type[Any], *args: Any, **kwargs: Any) -> Any:
                try:
                    return kind(*args, **kwargs)
                except ValueError as error:
                    raised.append(error)
                    raise

            for base in (Strategy, Callback):
                self.parser.add_instantiator(construct, base)
            try:
                super().instantiate_classes()
            except Exception:
                if raised:
                    raise raised[-1] from None
                raise

    done = CLI(
        LightningModule,
        LightningDataModule,
        SaveConfigCallback if save_config else None,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=1234,
        args=_with_recipes(words),
    )
    return done.trainer


def _with_recipes(words: list[str]) -> list[str]:
    """Replace the name of a recipe behind `--config` or `-c` by its file."""
    from lightning_dhellam import recipes

    found = []
    for before, word in zip(["", *words], words, strict=False):
        option, equals, value = word.partition("=")
        if option in recipes.OPTIONS and equals and not Path(value).exists():
            word = f"{option}={recipes.find(value, option)}"
        elif before in recipes.OPTIONS and not Path(word).exists():
            word = str(recipes.find(word, before))
        found.append(word)
    return found


def _mistake(error: BaseException | None) -> BaseException | None:
    """The user's mistake behind an error: what this package raised, which needs no traceback.

    jsonargparse wraps what a constructor raises, so the causes are searched.
    """
    here = Path(__file__).resolve().parent
    ours = (here, *(here.parent / name for name in ("kernels", "search", "recipes")))
    while error is not None:
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
        if isinstance(error, ValueError) and any(map(raised_in.is_relative_to, ours)):
            return error
        error = error.__cause__ or error.__context__
    return None


if __name__ == "__main__":
    sys.exit(main())
