"""`dhellam convert`: a folder of Hugging Face to a checkpoint and back, in one process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_dhellam.checkpoint import loop, read_topology
from lightning_dhellam.checkpoint.model import saved_model
from lightning_dhellam.commands.parser import Parser
from lightning_dhellam.files import check_folder
from lightning_dhellam.models import (
    CausalLM,
    ModelConfig,
    import_huggingface,
    save_huggingface,
)
from lightning_dhellam.models.fitting import KINDS
from lightning_dhellam.models.pretrained import pretrained_config, stored_dtype
from lightning_dhellam.models.saving import check_target
from lightning_dhellam.models.source import CONFIG
from lightning_dhellam.parallel import ParallelContext

_FORMS = ("huggingface", "checkpoint")


def convert_command(argv: Sequence[str]) -> int:
    """Run `dhellam convert <argv>`. Returns the exit code.

    Raises:
        ValueError: what is to be converted cannot be read, or what it is converted to is there.
        WriteError: there is no room for it.
    """
    parser = Parser(
        prog="dhellam convert",
        description="Convert a folder of Hugging Face to a checkpoint, or a checkpoint to such a"
        " folder. It takes no GPU, and the memory of the host for the weights once.",
    )
    parser.add_argument("source", type=Path, help="folder of Hugging Face, or checkpoint")
    parser.add_argument("target", type=Path, help="folder to write, empty or not there yet")
    parser.add_argument("--to", choices=_FORMS, help="form to write; left out, the other one")
    parser.add_argument(
        "--dtype", help=f"of the weights: {', '.join(KINDS)}; left out, as they are"
    )
    parser.add_argument(
        "--max_shard_size", default="5GB", help="of a file of Hugging Face (default: 5GB)"
    )
    parser.add_argument("--tokenizer", type=Path, help="folder of another tokenizer to carry along")
    parser.add_argument(
        "--origin", type=Path, help="folder that the weights of a checkpoint were read from"
    )
    options = parser.parse_args(argv)
    is_folder = (options.source / CONFIG).is_file()
    form = options.to or _FORMS[is_folder]
    check_folder(options.target, str(options.target))
    check_target(options.target)
    if options.dtype is not None and options.dtype not in KINDS:
        raise ValueError(f"--dtype {options.dtype} is no type of weights: use {', '.join(KINDS)}")
    if form == "checkpoint" and (options.tokenizer or options.origin):
        raise ValueError(
            "--tokenizer and --origin are for a folder of Hugging Face: leave them out"
        )
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    model = (_of_folder if is_folder else _of_checkpoint)(options.source, dtype)
    if form == "checkpoint":
        loop.save(options.target, model, None, None, {})
    else:
        source = options.origin or model.origin
        if dtype is None and source is not None and (source / CONFIG).is_file():
            dtype = stored_dtype(source)
        save_huggingface(
            model,
            options.target,
            dtype,
            max_shard_size=options.max_shard_size,
            tokenizer=options.tokenizer,
            origin=options.origin,
        )
    print(f"written to {options.target}")
    return 0


def _of_folder(folder: Path, dtype: torch.dtype | None) -> CausalLM:
    model = _holder(pretrained_config(folder), dtype or stored_dtype(folder))
    import_huggingface(model, folder)
    return model


def _of_checkpoint(folder: Path, dtype: torch.dtype | None) -> CausalLM:
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is not a folder: give one of Hugging Face, with {CONFIG}, or a checkpoint"
        )
    read_topology(folder)
    saved = saved_model(folder)
    if saved is None:
        raise ValueError(
            f"checkpoint {folder} does not say which model it is of: load it with the version that"
            " wrote it, and save it with this one"
        )
    given: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in saved.items()
    }
    model = _holder(ModelConfig(**given), dtype or torch.float32)
    loop.load(folder, model, None, None)
    return model


def _holder(config: ModelConfig, dtype: torch.dtype) -> CausalLM:
    """A model that holds weights, in this process alone."""
    return CausalLM(config, ParallelContext.single(torch.device("cpu")), dtype, drawn=False)
