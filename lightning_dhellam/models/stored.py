"""Tensors in the files of a model of Hugging Face, read a part at a time, when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lightning_dhellam.files import read_json
from lightning_dhellam.models.conversion import Shape

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
_INDEXED = (INDEX, "pytorch_model.bin.index.json")
_WHOLE = (WHOLE, "pytorch_model.bin")
_REMEDY = "fetch or save the model again"
TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""What safetensors calls types of weights."""


class Stored:
    """A tensor in a safetensors file. Only `stored[slices]` reads anything, and no more than that.

    Args:
        file: opened by safetensors.
        name: of the tensor in it.

    Attributes:
        shape: of the whole.
        kind: its type, by torch's name if it has one.
    """

    def __init__(self, file: Any, name: str) -> None:
        self._file, self._name, self._slice = file, name, file.get_slice(name)
        self.shape: Shape = tuple(self._slice.get_shape())
        kind = self._slice.get_dtype()
        self.kind: str = TYPES.get(kind, kind)

    def __getitem__(self, slices: Any) -> Tensor:
        # safetensors cuts nothing that has no dimension.
        found: Tensor = self._slice[slices] if self.shape else self._file.get_tensor(self._name)
        return found


Readable = Tensor | Stored
"""A tensor in memory or in a file; a `Whole` of the table of parameters either way."""


def kind_of(tensor: Readable) -> str:
    """The type of a tensor, such as `bfloat16`."""
    return tensor.kind if isinstance(tensor, Stored) else str(tensor.dtype).removeprefix("torch.")


def stored_tensors(folder: Path, architecture: str) -> dict[str, Readable]:
    """All tensors of a folder by their names; nothing of them is read yet.

    Every file is opened, so that one that is missing or cut off is found before any is used.

    Args:
        folder: that `save_pretrained` has written.
        architecture: the class of Hugging Face whose weights are wanted.

    Raises:
        ValueError: there are none, or a file is missing or damaged.
    """
    whole = [folder / name for name in _WHOLE if (folder / name).is_file()][:1]
    if whole:
        return _of_file(whole[0])
    index = next((folder / name for name in _INDEXED if (folder / name).is_file()), None)
    if index is None:
        raise ValueError(
            f"{folder} has none of {', '.join((*_WHOLE, *_INDEXED))}: give a folder that"
            f" {architecture}.save_pretrained has written"
        )
    places = read_json(index, "file of Hugging Face", _REMEDY).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ValueError(f"{index} has no weight_map of names of files: {_REMEDY}")
    return _of_shards(folder, index, places)


def _of_shards(folder: Path, index: Path, places: Mapping[str, str]) -> dict[str, Readable]:
    names = sorted(set(places.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{folder} lacks {listed(missing)}, of the {len(names)} files that {index.name} names:"
            f" {_REMEDY}"
        )
    tensors: dict[str, Readable] = {}
    for name in names:
        tensors |= _of_file(folder / name)
    return tensors


def _of_file(file: Path) -> dict[str, Readable]:
    try:
        if file.suffix == ".safetensors":
            opened = safe_open(file, "pt")
            return {name: Stored(opened, name) for name in opened.keys()}  # noqa: SIM118
        return dict(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{file} cannot be read ({type(error).__name__}: {reason}): {_REMEDY}"
        ) from error


def listed(names: Iterable[str], most: int = 8) -> str:
    """The first of some names, and how many more there are."""
    every = list(names)
    rest = f" and {len(every) - most} more" if len(every) > most else ""
    return ", ".join(every[:most]) + rest
