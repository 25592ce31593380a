"""`dhellam search`: the plan of a recipe, without training it."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

USAGE = "dhellam search --config FILE_OR_RECIPE [options] [overrides as for `dhellam fit`]"


def search_command(argv: Sequence[str]) -> int:
    """Profile the operators of a recipe's model on its first batch, and search the best plan.

    Starts the recipe's processes, repeats one batch without updating weights in between, and
    writes the plan file, the profile, the table and the pictures.
    """
    # argparse, since jsonargparse cannot leave the words that are meant for LightningCLI.
    parser = argparse.ArgumentParser(
        prog="dhellam search",
        usage=USAGE,
        description=search_command.__doc__,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, default=Path("runs/search"), help="folder")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each plan")
    parser.add_argument("--profile", type=str, default=None, help="file to load or to make")
    parser.add_argument(
        "--memory_limit", type=float, default=None, help="bytes in a pair of layers"
    )
    options, words = parser.parse_known_args(list(argv))
    if not any(word.partition("=")[0] == "--config" for word in words):
        raise ValueError("search needs --config FILE, or the name of a recipe: see dhellam recipes")

    from lightning_dhellam.cli import run_lightning

    search = {
        "class_path": "lightning_dhellam.callbacks.AutoSearch",
        "init_args": {
            "rounds": options.rounds,
            "profile": options.profile,
            "memory_limit": options.memory_limit,
            "folder": str(options.output),
            "replay": True,
        },
    }
    run_lightning(["fit", *words, f"--trainer.callbacks={json.dumps([search])}", *_NOTHING_ELSE])
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"use it with --trainer.strategy.plan {options.output / 'plan.json'}")
    return 0


_NOTHING_ELSE = (
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.max_steps=1",
    "--trainer.limit_val_batches=0",
    "--trainer.num_sanity_val_steps=0",
)
"""One batch, and no trace of the run but what the search writes."""
