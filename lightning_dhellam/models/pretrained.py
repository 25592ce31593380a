"""What a folder of Hugging Face says of the model that begins with it, before any is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from lightning_dhellam.models.carried import check_vocabulary
from lightning_dhellam.models.config import ModelConfig
from lightning_dhellam.models.families import family_of
from lightning_dhellam.models.fitting import KINDS, check_tensors
from lightning_dhellam.models.fused import unfused
from lightning_dhellam.models.presets import preset
from lightning_dhellam.models.source import CONFIG, check_config, config_of, read_config
from lightning_dhellam.models.stored import kind_of, stored_tensors


def pretrained_config(
    folder: str | PathLike[str], overrides: Mapping[str, Any] | None = None
) -> ModelConfig:
    """The model of a folder, whose files are there and fit; of its weights nothing is read.

    Args:
        folder: of Hugging Face.
        overrides: fields that its weights leave open, with other values.

    Raises:
        ValueError: the folder cannot be used, or a field contradicts it.
    """
    path = Path(folder)
    if not (path / CONFIG).is_file():
        what = f"has no {CONFIG}" if path.is_dir() else "is not a folder"
        raise ValueError(f"pretrained={folder} {what}: give a folder of Hugging Face")
    said = config_of(path)
    config = config_of(path, **overrides) if overrides else said
    family = family_of(said)
    for name in overrides or ():
        _check_alone(path, name, getattr(config, name), said)
    tensors = unfused(stored_tensors(path, family.architecture), family)
    every = family.table(said, family.names, said.padded_vocab_size(1), said.num_experts or 1)
    check_tensors(said, list(every), tensors)
    check_vocabulary(path, said.vocab_size)
    return config


def _check_alone(path: Path, name: str, value: Any, said: ModelConfig) -> None:
    """Refuse one field that is another in the folder."""
    try:
        check_config(read_config(path), replace(said, **{name: value}), family_of(said))
    except ValueError as error:
        raise ValueError(
            f"overrides.{name}={value!r} contradicts pretrained={path}, whose model has"
            f" {name}={getattr(said, name)!r}: leave it out, or train such a model without"
            " pretrained"
        ) from error


def check_preset(folder: str | PathLike[str], name: str) -> None:
    """Refuse a preset that is another model than that of a folder.

    Raises:
        ValueError: with the fields that differ.
    """
    try:
        check_config(read_config(folder), preset(name), family_of(config_of(folder)))
    except ValueError as error:
        raise ValueError(
            f"preset={name} contradicts pretrained={folder}: leave out preset (--model.preset"
            f" null), for the folder says what the model is ({error})"
        ) from error


def stored_dtype(folder: str | PathLike[str]) -> torch.dtype:
    """The type of a folder's weights, of which the widest counts."""
    kinds = {kind_of(tensor) for tensor in stored_tensors(Path(folder), "a model").values()}
    widest = next((kind for kind in KINDS if kind in kinds), "float32")
    if {"float16", "bfloat16"} <= kinds:
        widest = "float32" if widest != "float64" else widest
    found: torch.dtype = getattr(torch, widest)
    return found
