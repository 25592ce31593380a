"""`dhellam demo`: real text, a tokenizer, and a small Llama trained with two strands."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lightning_dhellam.commands.numbers import positive
from lightning_dhellam.commands.parser import Parser

RECIPE = "llama-tiny-2cpu"


def demo_command(argv: Sequence[str]) -> int:
    """Prepare the standard library's source as data, then fit the demo's recipe on it.

    Uses the GPUs of this machine if there are any, otherwise two CPU processes. It does as many
    steps as fit into three minutes, the search of the plan included.
    """
    parser = Parser(prog="dhellam demo", description=demo_command.__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="for data and run")
    parser.add_argument("--max_steps", type=positive, default=None, help="instead of what fits")
    parser.add_argument("--vocab_size", type=positive, default=4096, help="tokens of the tokenizer")
    options = parser.parse_args(list(argv))

    from lightning_dhellam.commands.data import data_command
    from lightning_dhellam.commands.fit import run_lightning

    data = options.folder / "data"
    # Lightning starts the other processes with this same command: the data is ready by then.
    if "LOCAL_RANK" not in os.environ:
        prepare = ["prepare", "--source", "stdlib", "--output", str(data)]
        code = data_command([*prepare, "--vocab_size", str(options.vocab_size)])
        if code:
            return code
    words = ["fit", "--config", RECIPE, "--data.path", str(data)]
    words += ["--trainer.default_root_dir", str(options.folder)]
    words += ["--model.overrides", f"{{vocab_size: {options.vocab_size}}}"]
    if options.max_steps is not None:
        words += ["--trainer.max_steps", str(options.max_steps)]
    else:
        words += ["--trainer.callbacks+=lightning_dhellam.commands.pace.Pace"]
    run_lightning([*words, *_hardware()])
    return 0


def _hardware() -> list[str]:
    """Overrides of the recipe for this machine's GPUs."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        return []
    devices = 2 if count > 1 else 1
    return [
        "--trainer.accelerator=gpu",
        f"--trainer.devices={devices}",
        "--trainer.precision=bf16-mixed",
        f"--trainer.strategy.tensor_parallel_size={devices}",
    ]
