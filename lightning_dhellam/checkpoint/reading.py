"""Tensors read from files of torch's distributed checkpoint, by what describes them.

That, `.metadata`, is a pickle: here it makes descriptions and nothing else, so that no code is run.
Torch reads a tensor whole into memory of its own, and copies of it what is wanted. Here what lies
in a file as it is wanted is read into its place, and of the rest the rows that are wanted.
"""

from __future__ import annotations

import pickle
import sys
from collections import OrderedDict
from collections.abc import Mapping
from io import BytesIO
from math import prod
from pathlib import PurePath
from pkgutil import resolve_name
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.utils import _create_file_view

from lightning_dhellam.checkpoint.content import REMEDY
from lightning_dhellam.checkpoint.pieces import Pieces
from lightning_dhellam.remote import Folder

METADATA = ".metadata"
_HOME = "torch.distributed.checkpoint."
_DESCRIPTIONS = (
    *(
        f"{_HOME}metadata.{name}"
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "_MEM_FORMAT_ENCODING",
            "MetadataIndex",
            "StorageMeta",
        )
    ),
    f"{_HOME}filesystem._StorageInfo",
    "torch.Size",
    "torch.serialization._get_layout",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
)


def read_metadata(folder: Folder) -> Metadata:
    """What tensors a folder has, and where.

    Raises:
        ValueError: it is missing or damaged.
    """
    file = folder / METADATA
    try:
        with file.open("rb") as stream:
            found = _Descriptions(stream).load()
        if not isinstance(found, Metadata):
            raise pickle.UnpicklingError(f"it is a {type(found).__name__}")
    except FileNotFoundError as error:
        raise ValueError(f"checkpoint {folder} has no {METADATA}: {REMEDY}") from error
    except Exception as error:
        raise ValueError(
            f"{file} cannot be read ({type(error).__name__}: {error}): it is damaged, {REMEDY}"
        ) from error
    return found


def load_pieces(folder: Folder, metadata: Metadata, tensors: Mapping[str, Pieces]) -> None:
    """Fill the pieces of some tensors with what a folder has of them.

    Raises:
        ValueError: a file is missing or damaged.
    """
    wanted: dict[str, list[tuple[Any, ReadItem]]] = {}
    try:
        for item in create_default_local_load_plan(dict(tensors), metadata).items:
            lies = metadata.storage_data[item.storage_index]
            wanted.setdefault(lies.relative_path, []).append((lies, item))
        for name, items in wanted.items():
            with (folder / name).open("rb", buffering=0) as file:
                for lies, item in sorted(items, key=lambda one: one[0].offset):
                    target = tensors[item.dest_index.fqn].piece(item.dest_index).detach()
                    _fill(file, lies, item, _part(target, item.dest_offsets, item.lengths))
    except FileNotFoundError as error:
        missing = PurePath(error.filename or error.args[-1]).name
        raise ValueError(f"checkpoint {folder} has no {missing}: {REMEDY}") from error
    except Exception as error:
        raise ValueError(
            f"checkpoint {folder} cannot be read ({type(error).__name__}: {error}): if it is"
            f" damaged, {REMEDY}"
        ) from error


class _Descriptions(pickle.Unpickler):
    """Makes descriptions of tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if f"{module}.{name}" not in _DESCRIPTIONS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return resolve_name(f"{module}:{name}")


def _part(tensor: Tensor, start: Any, lengths: Any) -> Tensor:
    for axis, (at, count) in enumerate(zip(start, lengths, strict=True)):
        tensor = tensor.narrow(axis, at, count)
    return tensor


def _fill(file: Any, lies: Any, item: ReadItem, target: Tensor) -> None:
    """Read what `item` wants of a tensor that lies in a file."""
    view: Any = _create_file_view(file, lies.offset, lies.length)
    laid = _laid(view)
    if laid is None or laid.dtype != target.dtype:
        view.seek(0)
        stored = torch.load(view, map_location="cpu", weights_only=True)
        target.copy_(_part(stored, item.storage_offsets, item.lengths))
        return
    if not target.numel():
        return
    # Of a tensor of no dimension there is one row, of one value.
    first, rows = (item.storage_offsets[0], item.lengths[0]) if laid.shape else (0, 1)
    row = laid.shape[1:]
    file.seek(lies.offset + laid.start + first * prod(row) * laid.dtype.itemsize)
    if target.is_contiguous() and target.shape[1:] == row:
        _read_into(file, target)
        return
    whole = torch.empty(rows, *row, dtype=laid.dtype)
    _read_into(file, whole)
    target.copy_(_part(whole, (0, *item.storage_offsets[1:]), item.lengths))


def _read_into(file: Any, tensor: Tensor) -> None:
    values: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    left = memoryview(values)
    while left:
        count = file.readinto(left)
        if not count:
            raise EOFError(f"{getattr(file, 'name', 'it')} ends {left.nbytes} bytes early")
        left = left[count:]


class _Laid(NamedTuple):
    """How a tensor lies in what torch has saved of it.

    Attributes:
        start: of its values, in bytes.
        shape: of it, which is contiguous.
        dtype: of it.
    """

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def _laid(view: Any) -> _Laid | None:
    """How the tensor lies that is saved in `view`; None if only torch can read it."""
    reader: Any = torch._C.PyTorchFileReader(view)
    if reader.get_record("byteorder") != sys.byteorder.encode():
        return None
    try:
        saved = _Header(BytesIO(reader.get_record("data.pkl"))).load()
        (_, kind, key, _, _), offset, shape, strides = saved
        dtype: torch.dtype = kind._dtype
    except (pickle.UnpicklingError, AttributeError, TypeError, ValueError):
        return None
    if strides != torch.empty(shape, device="meta").stride():
        return None
    start = reader.get_record_offset(f"data/{key}") + offset * dtype.itemsize
    return _Laid(start, shape, dtype)


class _Header(pickle.Unpickler):
    """Makes of a saved tensor what describes it: storage, offset, shape and strides."""

    def persistent_load(self, pid: Any) -> Any:
        return pid

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *given: given[:4]
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and isinstance(getattr(torch, name, None), type):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it holds {module}.{name}")
