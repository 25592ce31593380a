"""`dhellam convert`: between folders of Hugging Face, checkpoints and files of Lightning's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from lightning_dhellam.checkpoint import loop
from lightning_dhellam.checkpoint.lightning_file import read_whole, save_file
from lightning_dhellam.checkpoint.model import config_of, saved_model
from lightning_dhellam.commands.parser import Parser
from lightning_dhellam.files import check_file, check_folder
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

_FORMS = ("huggingface", "checkpoint", "lightning")


def convert_command(argv: Sequence[str]) -> int:
    """Run `dhellam convert <argv>`. Returns the exit code.

    Raises:
        ValueError: what is to be converted cannot be read, or what it is converted to is there.
        WriteError: there is no room for it.
    """
    parser = Parser(
        prog="dhellam convert",
        description="Convert a folder of Hugging Face to a checkpoint, a checkpoint to such a"
        " folder, or to a file that other strategies of Lightning load. It takes no GPU, and the"
        " memory of the host for what is converted once.",
    )
    parser.add_argument("source", type=Path, help="folder of Hugging Face, or checkpoint")
    parser.add_argument(
        "target", type=Path, help="folder to write, empty or not there yet; a file for lightning"
    )
    parser.add_argument(
        "--to",
        choices=_FORMS,
        help="form to write; left out, a checkpoint of a folder of Hugging Face, and such a folder"
        " of a checkpoint",
    )
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
    if form == "lightning":
        if options.target.exists():
            raise ValueError(f"{options.target} is there already: give the path of a new file")
        check_file(options.target, str(options.target))
    else:
        check_folder(options.target, str(options.target))
        check_target(options.target)
    if options.dtype is not None and options.dtype not in KINDS:
        raise ValueError(f"--dtype {options.dtype} is no type of weights: use {', '.join(KINDS)}")
    if form != "huggingface" and (options.tokenizer or options.origin):
        raise ValueError(
            "--tokenizer and --origin are for a folder of Hugging Face: leave them out"
        )
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    if form == "lightning":
        _write_file(options.source, options.target, dtype)
        print(f"written to {options.target}")
        return 0
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


def _write_file(source: Path, target: Path, dtype: torch.dtype | None) -> None:
    found, lines = read_whole(source)
    if dtype is not None:
        weights = found["state_dict"]
        for name, value in weights.items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                weights[name] = value.to(dtype)
    save_file(target, found)
    for line in lines:
        print(line)


def _of_folder(folder: Path, dtype: torch.dtype | None) -> CausalLM:
    model = _holder(pretrained_config(folder), dtype or stored_dtype(folder))
    import_huggingface(model, folder)
    return model


def _of_checkpoint(folder: Path, dtype: torch.dtype | None) -> CausalLM:
    if not folder.exists():
        raise ValueError(
            f"{folder} is not a folder: give one of Hugging Face, with {CONFIG}, or a checkpoint"
        )
    saved = saved_model(folder)
    if saved is None:
        raise ValueError(
            f"checkpoint {folder} does not say which model it is of: load it with the version that"
            " wrote it, and save it with this one"
        )
    model = _holder(config_of(saved), dtype or torch.float32)
    loop.load(folder, model, None, None)
    return model


def _holder(config: ModelConfig, dtype: torch.dtype) -> CausalLM:
    """A model that holds weights, in this process alone."""
    return CausalLM(config, ParallelContext.single(torch.device("cpu")), dtype, drawn=False)
