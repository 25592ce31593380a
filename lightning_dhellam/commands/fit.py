"""`dhellam fit`, `validate`, `test` and `predict`: LightningCLI with recipes by name."""

from __future__ import annotations

import warnings
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning.pytorch as pl


def run_lightning(words: list[str], keep: bool = True) -> pl.Trainer:
    """LightningCLI with Lightning's subcommands: `fit --config recipe --trainer.max_steps 10`.

    `keep` leaves the configuration beside the logs, as Lightning does, and a checkpoint of the end
    of training. Gives the trainer when it is done.

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
        from lightning_dhellam.callbacks import SaveEnd
    # Lightning suspects a mistake when arguments are given that are not the process's own.
    warnings.filterwarnings("ignore", "LightningCLI's args parameter", UserWarning)

    class CLI(LightningCLI):
        def before_instantiate_classes(self) -> None:
            command = self.config[self.config.subcommand]
            take_model_of_checkpoint(command.model, command.get("ckpt_path"))

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
        SaveConfigCallback if keep else None,
        trainer_defaults={"callbacks": [SaveEnd()]} if keep else None,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=1234,
        args=_with_recipes(words),
    )
    return done.trainer


def take_model_of_checkpoint(model: Any, ckpt_path: Any) -> None:
    """Where a `LanguageModel` is configured without overrides, take those of its checkpoint.

    `model` is what LightningCLI has read: a class and its arguments, which are changed.
    """
    from lightning.pytorch.utilities.rank_zero import rank_zero_info

    from lightning_dhellam.checkpoint.model import overrides_for
    from lightning_dhellam.module import LanguageModel, make_config

    kind = resolve_name(model.class_path)
    if not issubclass(kind, LanguageModel) or model.init_args.get("overrides"):
        return
    if not ckpt_path or not Path(ckpt_path).exists():  # what Lightning looks for is not known yet
        return
    preset = model.init_args.preset
    overrides = overrides_for(Path(ckpt_path), make_config(preset, None))
    if overrides:
        model.init_args.overrides = overrides
        shown = ", ".join(f"{name}={value}" for name, value in overrides.items())
        rank_zero_info(f"model of {ckpt_path}: {preset} with {shown}")


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
