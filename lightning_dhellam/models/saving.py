"""A model as a folder of Hugging Face, which is whole or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.files import local_path, save_text, staged_directory
from lightning_dhellam.models.carried import carry, check_vocabulary
from lightning_dhellam.models.causal_lm import CausalLM
from lightning_dhellam.models.conversion import Shape
from lightning_dhellam.models.described import config_json
from lightning_dhellam.models.families import family_of
from lightning_dhellam.models.fitting import KINDS
from lightning_dhellam.models.huggingface import table_of, whole_parameters
from lightning_dhellam.models.progress import progress
from lightning_dhellam.models.shards import bytes_of, index_of, shards
from lightning_dhellam.models.source import CONFIG
from lightning_dhellam.models.stored import INDEX
from lightning_dhellam.models.written import tensor_file
from lightning_dhellam.parallel.collectives import together


def save_huggingface(
    model: CausalLM,
    folder: str | PathLike[str],
    dtype: torch.dtype | str | None = None,
    *,
    max_shard_size: int | str = "5GB",
    tokenizer: Any = None,
    origin: str | PathLike[str] | None = None,
) -> None:
    """Write a folder that transformers and `import_huggingface` read. Every rank must call this.

    It holds the weights as safetensors, `config.json`, and what belongs to the model in the folder
    that its weights are from: `generation_config.json` and the files of the tokenizer. Rank 0
    writes; its host holds one parameter at a time. The folder has its name
    when it is whole, and is gone when something fails.

    Args:
        model: this rank's part of it.
        folder: to write, which is empty or does not exist.
        dtype: of the weights, such as `torch.bfloat16` or `"bfloat16"`; that of the model's own if
            left out.
        max_shard_size: of a file, such as `5GB`; more tensors go into several, with an index.
        tokenizer: the folder of another tokenizer than the origin's, or one of transformers.
        origin: the folder that the weights are from, if it is not the one they were read from.

    Raises:
        ValueError: the folder is not empty, an argument cannot be used, or the tokenizer has more
            tokens than the model; before anything is written.
        WriteError: there is no room, or the disk fails.
    """
    topology = model.context.topology
    world = model.context.world_group if topology.world_size > 1 else None
    target = local_path(folder)
    source = model.origin if origin is None else Path(origin)
    kind = _kind(dtype, model)
    every = table_of(model)
    shapes = {name: shape for one in every for name, shape in one.theirs.items()}
    width = torch.empty((), dtype=kind).element_size()
    files = shards(shapes.items(), width, bytes_of(max_shard_size))
    total = width * sum(torch.Size(shape).numel() for shape in shapes.values())
    with ExitStack() as stack:

        def begin() -> Path | None:
            if topology.rank:
                return None
            check_target(target)
            if origin is not None and not (Path(origin) / CONFIG).is_file():
                raise ValueError(f"origin={origin} has no {CONFIG}: give a folder of Hugging Face")
            described = config_json(model.config, family_of(model.config), source, _name(kind))
            partial = stack.enter_context(staged_directory(target))
            save_text(partial / CONFIG, json.dumps(described, indent=2) + "\n")
            carry(source, tokenizer, partial)
            check_vocabulary(partial, model.config.vocab_size)
            if len(files) > 1:
                index = json.dumps(index_of(files, total), indent=2, sort_keys=True)
                save_text(partial / INDEX, index + "\n")
            return partial

        partial = together(begin, world)
        tensors = _tensors(model)
        for shard in files:
            own = {name: shapes[name] for name in shard.tensors}
            failure = _fill(partial and partial / shard.name, own, kind, tensors)
            together(lambda: _check(failure), world)  # noqa: B023 called at once

        def publish() -> None:
            if not topology.rank:
                check_target(target)
            stack.close()

        together(publish, world)


def _tensors(model: CausalLM) -> Iterator[tuple[str, Tensor | None]]:
    """Every tensor of the files in order, on rank 0; on all others its name."""
    every = table_of(model)
    parameters = whole_parameters(model)
    for conversion in progress(every, "writing weights", model.context.topology):
        found = next(parameters)
        for name in conversion.theirs:
            yield name, found.pop(name, None)


def _fill(
    path: Path | None,
    shapes: Mapping[str, Shape],
    kind: torch.dtype,
    tensors: Iterator[tuple[str, Tensor | None]],
) -> OSError | None:
    """Take as many tensors as a file has; rank 0 writes it. Returns what a disk has failed at."""
    taken = islice(tensors, len(shapes))
    failure = None
    if path is not None:
        try:
            with tensor_file(path, shapes, kind) as file:
                for name, tensor in taken:
                    assert tensor is not None, "rank 0 has them all"
                    file.put(name, tensor)
        except OSError as error:
            failure = error
    for _ in taken:  # which all ranks bring together
        pass
    return failure


def _check(failure: OSError | None) -> None:
    if failure is not None:
        raise failure


def check_target(target: Path) -> None:
    """Refuse a folder to write that has something in it, or is none.

    Raises:
        ValueError: with what is there.
    """
    if target.is_dir() and not any(target.iterdir()):
        return
    if os.path.lexists(target):
        what = "is not empty" if target.is_dir() else "is no folder"
        raise ValueError(f"{target} {what}, and nothing is overwritten: give another folder")


def _kind(dtype: torch.dtype | str | None, model: CausalLM) -> torch.dtype:
    if dtype is None:
        return model.transformer_config.params_dtype
    if _name(dtype) not in KINDS:
        raise ValueError(f"dtype={dtype!r} is no type of weights: use {', '.join(KINDS)}")
    found: torch.dtype = getattr(torch, _name(dtype))
    return found


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")
