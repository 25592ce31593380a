"""`dhellam fit`, `validate`, `test` and `predict`: LightningCLI with recipes by name."""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from argparse import ArgumentError
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from lightning_dhellam.importing import uncollected

if TYPE_CHECKING:
    import lightning.pytorch as pl

_NOT_IN_FILES = ("help", "config", "print_config")


def loop_command(words: list[str]) -> int:
    """Run the loop that the first word names, as `run_lightning`. Returns the exit code."""
    run_lightning(words)
    return 0


def run_lightning(words: list[str], keep: bool = True) -> pl.Trainer:
    """LightningCLI with Lightning's subcommands: `fit --config recipe --trainer.max_steps 10`.

    `keep` leaves the configuration beside the logs, as Lightning does, and a checkpoint of the end
    of training. Gives the trainer when it is done.

    Raises:
        ValueError: a mistake in the configuration.
    """
    trainer: pl.Trainer = _lightning(words, keep=keep, run=True).trainer
    return trainer


def configuration(words: list[str]) -> dict[str, Any]:
    """What `run_lightning` would be configured by, of which nothing but the model is made.

    Gives `trainer` and `data` as they are configured, and under `model` the module.

    Raises:
        ValueError: a mistake in the configuration.
    """
    from jsonargparse import ArgumentParser
    from lightning.pytorch import LightningModule

    read = _lightning(["fit", *words], keep=False, run=False)
    found: dict[str, Any] = read.config[read.config.subcommand].as_dict()
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningModule, "model")
    given = parser.parse_object({"model": found["model"]})
    return {**found, "model": parser.instantiate_classes(given).model}


def _lightning(words: list[str], *, keep: bool, run: bool) -> Any:
    """LightningCLI, when it has run the subcommand, or only read what it is configured by."""
    with uncollected():
        import lightning
        from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
        from lightning.pytorch.callbacks import ModelSummary
        from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
        from lightning.pytorch.loggers import Logger
        from lightning.pytorch.strategies import Strategy

        import lightning_dhellam.strategy  # noqa: F401  registers the strategy by name
        from lightning_dhellam.callbacks import PredictionWriter, SaveEnd
        from lightning_dhellam.commands.configuration import (
            check_devices,
            prepared,
            refuse_blanks,
        )
        from lightning_dhellam.commands.mistakes import one_line
        from lightning_dhellam.displays import displays

    # A user's own module lies where he is; an installed one of that name goes before it.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    # Lightning suspects a mistake when arguments are given that are not the process's own.
    warnings.filterwarnings("ignore", "LightningCLI's args parameter", UserWarning)

    class CLI(LightningCLI):
        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            # A parser takes a second to make, and one is needed.
            return {words[0]: LightningCLI.subcommands()[words[0]]}

        def init_parser(self, **options: Any) -> LightningArgumentParser:
            return super().init_parser(**{"prog": "dhellam", **options}, exit_on_error=False)

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            options = self._options(words[0])
            keys = list(dict.fromkeys(name.partition(".")[0] for name in options))
            try:
                super().parse_arguments(parser, [words[0], *prepared(words[1:], keys)])
            except ArgumentError as error:
                raise ValueError(one_line(str(error), options, words[0])) from None
            config = self.config[self.config.subcommand].as_dict()
            refuse_blanks(config, Trainer.__init__)
            if run:
                check_devices(config["trainer"])

        def _options(self, command: str) -> list[str]:
            """What can be configured, such as `trainer.max_steps`."""
            actions = self._subcommand_parsers[command]._actions
            return [action.dest for action in actions if action.dest not in _NOT_IN_FILES]

        def before_instantiate_classes(self) -> None:
            command = self.config[self.config.subcommand]
            take_model_of_checkpoint(command.model, command.get("ckpt_path"))

        def instantiate_trainer(self, **options: Any) -> Trainer:
            trainer = self._get(self.config_init, "trainer", default={})
            given = trainer.get("callbacks") or []
            shown = displays(trainer)
            options["callbacks"] = [*(given if isinstance(given, list) else [given]), *shown]
            if any(isinstance(one, ModelSummary) for one in shown):
                options["enable_model_summary"] = False  # of Lightning's own
            try:
                return super().instantiate_trainer(**options)
            except (ValueError, TypeError, ImportError) as error:
                raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
                if not raised_in.startswith(str(Path(lightning.__file__).parent)):
                    raise
                # What flags of the Trainer cannot be, in a line or two.
                raise ValueError(f"trainer: {' '.join(str(error).split())}") from error

        def _run_subcommand(self, subcommand: str) -> None:
            if run:
                super()._run_subcommand(subcommand)

        def instantiate_classes(self) -> None:
            if not run:
                return
            # Where a string or nothing is allowed as well as an object, jsonargparse puts what the
            # constructor raised into the text of an error of its own, whose cause is another.
            raised: list[Exception] = []

            def construct(kind: type[Any], *args: Any, **kwargs: Any) -> Any:
                try:
                    return kind(*args, **kwargs)
                except Exception as error:
                    raised.append(error)
                    raise

            for base in (LightningModule, LightningDataModule, Strategy, Callback, Logger):
                self.parser.add_instantiator(construct, base)
            try:
                super().instantiate_classes()
            except Exception:
                if raised:
                    raise raised[-1] from None
                raise

    return CLI(
        LightningModule,
        LightningDataModule,
        SaveConfigCallback if keep else None,
        trainer_defaults={"callbacks": [SaveEnd(), PredictionWriter()]} if keep else None,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=1234,
        args=words,
    )


def take_model_of_checkpoint(model: Any, ckpt_path: Any) -> None:
    """Where a `LanguageModel` is configured without overrides, take those of its checkpoint.

    `model` is what LightningCLI has read: a class and its arguments, which are changed.
    """
    from lightning.pytorch.utilities.rank_zero import rank_zero_info

    from lightning_dhellam.checkpoint.model import overrides_for
    from lightning_dhellam.module import LanguageModel, make_config

    kind = resolve_name(model.class_path)
    given = model.init_args
    if not issubclass(kind, LanguageModel) or given.get("overrides") or given.get("pretrained"):
        return
    if not ckpt_path or not Path(ckpt_path).exists():  # what Lightning looks for is not known yet
        return
    preset = model.init_args.get("preset")
    overrides = overrides_for(Path(ckpt_path), make_config(preset, None))
    if overrides:
        model.init_args.overrides = overrides
        shown = ", ".join(f"{name}={value}" for name, value in overrides.items())
        rank_zero_info(f"model of {ckpt_path}: {preset or 'llama-tiny'} with {shown}")
