"""`dhellam search`: the plan of a recipe, without training it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_dhellam.commands.parser import Parser
from lightning_dhellam.files import check_folder
from lightning_dhellam.plan import BUILDERS
from lightning_dhellam.recipes import OPTIONS

if TYPE_CHECKING:
    import lightning.pytorch as pl

USAGE = "dhellam search --config FILE_OR_RECIPE [options] [overrides as for `dhellam fit`]"


def search_command(argv: Sequence[str]) -> int:
    """Profile the operators of a recipe's model on its first batch, and search the best plan.

    Starts the recipe's processes, repeats one batch without updating weights in between, and
    writes the plan file, the profile, the table and the pictures.
    """
    # argparse, since jsonargparse cannot leave the words that are meant for LightningCLI.
    parser = Parser(prog="dhellam search", usage=USAGE, description=search_command.__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/search"), help="folder")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each plan")
    parser.add_argument("--profile", type=str, default=None, help="file to load or to make")
    parser.add_argument(
        "--memory_limit", type=float, default=None, help="bytes in a pair of layers"
    )
    parser.add_argument(
        "--memory_slack", type=float, default=None, help="share of a step's memory, instead"
    )
    options, words = parser.parse_known_args(list(argv))
    if not any(word.partition("=")[0] in OPTIONS for word in words):
        raise ValueError("search needs --config FILE, or the name of a recipe: see dhellam recipes")
    check_folder(options.output, f"--output {options.output}")

    from lightning_dhellam.commands.fit import run_lightning

    given = ("rounds", "profile", "memory_limit", "memory_slack")
    search = {
        "class_path": "lightning_dhellam.callbacks.AutoSearch",
        "init_args": {
            **{name: value for name in given if (value := getattr(options, name)) is not None},
            "folder": str(options.output),
            "replay": True,
        },
    }
    callbacks = f"--trainer.callbacks={json.dumps([search])}"
    trainer = run_lightning(["fit", *words, callbacks, *_NOTHING_ELSE], keep=False)
    return _report(trainer) if trainer.is_global_zero else 0


def _report(trainer: pl.Trainer) -> int:
    """Say how to use what was found. Returns the exit code."""
    from lightning_dhellam.autosearch import AutoSearch

    search = AutoSearch.of(trainer)
    if search is None or search.findings is None or search.plan_file is None:
        print(
            "dhellam search: error: nothing was found, or it could not be written: see above",
            file=sys.stderr,
        )
        return 1
    winner = search.findings.winner
    if winner in BUILDERS:
        print(f"use it with --trainer.strategy.plan {winner}, or with {search.plan_file}")
    else:
        print(f"use it with --trainer.strategy.plan {search.plan_file}")
    return 0


_NOTHING_ELSE = (
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.max_steps=1",
    "--trainer.limit_val_batches=0",
    "--trainer.num_sanity_val_steps=0",
)
"""One batch, and no trace of the run but what the search writes."""
