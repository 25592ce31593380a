"""Tensors in files of torch's distributed checkpoint, each file with a checksum.

Any tool that reads such folders (`torch.distributed.checkpoint`) reads these. What describes them,
`.metadata`, is a pickle: here it makes descriptions and nothing else, so that no code is run.
"""

from __future__ import annotations

import os
import pickle
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    create_default_local_load_plan,
)
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner

from lightning_dhellam.checkpoint.content import REMEDY
from lightning_dhellam.checkpoint.description import check_size
from lightning_dhellam.checkpoint.pieces import Pieces
from lightning_dhellam.files import write_error

METADATA = ".metadata"
Checksums = dict[str, tuple[int, str]]
"""By the names of files how many bytes they have, and the checksum of those."""
_AT_ONCE = 2**22
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


def save_pieces(
    folder: Path, tensors: Mapping[str, Pieces], group: dist.ProcessGroup | None
) -> Checksums:
    """Write what this rank has of some tensors; the checksums of its files.

    Every rank of `group` must call this. What several ranks have is written by one of them, so that
    all write about as much.

    Raises:
        WriteError: there is no room for it, or the disk fails; on the rank that it befell.
    """
    writer = _Writer(folder)
    planner = _SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.save(
                dict(tensors),
                storage_writer=writer,
                planner=planner,
                process_group=group,
                no_dist=group is None,
            )
    except CheckpointException as error:
        rank = 0 if group is None else group.rank()
        if rank in error.failures:
            raise error.failures[rank][0] from None
    return writer.files.checksums


def read_metadata(folder: Path) -> Metadata:
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


def load_pieces(folder: Path, metadata: Metadata, tensors: Mapping[str, Pieces]) -> None:
    """Fill the pieces of some tensors with what a folder has of them.

    Raises:
        ValueError: a file is missing or damaged.
    """
    reader = dcp.FileSystemReader(folder)
    planner = _LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.state_dict = dict(tensors)
    try:
        reader.set_up_storage_reader(metadata, True)
        plan = create_default_local_load_plan(planner.state_dict, metadata)
        reader.read_data(plan, planner).wait()
    except FileNotFoundError as error:
        raise ValueError(
            f"checkpoint {folder} has no {Path(error.filename).name}: {REMEDY}"
        ) from error
    except Exception as error:
        raise ValueError(
            f"checkpoint {folder} cannot be read ({type(error).__name__}: {error}): if it is"
            f" damaged, {REMEDY}"
        ) from error


def checksum(file: Path) -> tuple[int, str]:
    """How many bytes a file has, and their checksum."""
    found = 0
    with file.open("rb") as stream:
        while data := stream.read(_AT_ONCE):
            found = zlib.crc32(data, found)
        return stream.tell(), f"{found:08x}"


def check_file(file: Path, size: int, digest: str) -> None:
    """Refuse a file that is not as it was written.

    Raises:
        ValueError: it is missing, cut off or changed.
    """
    check_size(file, size)
    if checksum(file) != (size, digest):
        raise ValueError(
            f"{file} is damaged: its checksum is not that of what was written: {REMEDY}"
        )


class _Descriptions(pickle.Unpickler):
    """Makes descriptions of tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if f"{module}.{name}" not in _DESCRIPTIONS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return resolve_name(f"{module}:{name}")


class _SavePlanner(DefaultSavePlanner):
    """Finds what is to be written among pieces."""

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].piece(index)


class _LoadPlanner(DefaultLoadPlanner):
    """Finds what is to be filled among pieces."""

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].piece(index)


class _Writer(dcp.FileSystemWriter):
    """Writes this rank's file, and keeps checksums of all that it has written."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sync_files=False)
        self.fs = self.files = _Files()

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        chunks = [item.tensor_data for item in plan.items if item.tensor_data is not None]
        self.files.needed = sum(
            data.chunk.sizes.numel() * data.properties.dtype.itemsize for data in chunks
        )
        return super().write_data(plan, planner)


class _Files(FileSystem):
    """Opens files for torch. Of a disk's error torch makes one about positions; here it stays.

    Attributes:
        checksums: of what was written.
        needed: about how many bytes a file takes.
    """

    def __init__(self) -> None:
        self.checksums: Checksums = {}
        self.needed: int | None = None

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with Path(path).open("wb", buffering=0) as file:
            written = _Written(file)
            try:
                yield written
                os.fsync(file.fileno())
            except Exception as error:
                found = written.error or error
                if not isinstance(found, OSError):
                    raise
                about = "about " if self.needed else ""
                raise write_error(Path(path), found, written.size, self.needed, about) from error
        name = Path(path).name.removesuffix(".tmp")
        self.checksums[name] = written.size, f"{written.checksum:08x}"


class _Written:
    """What torch writes to. Attributes: size and checksum of what was, and the disk's error."""

    def __init__(self, file: FileIO) -> None:
        self.file = file
        self.size = 0
        self.checksum = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        self.checksum = zlib.crc32(left, self.checksum)
        count = left.nbytes
        try:
            while left.nbytes:  # unbuffered: a disk that is almost full takes a part
                done = self.file.write(left)
                self.size += done
                left = left[done:]
        except OSError as error:
            self.error = error
            raise
        return count

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        """Nothing waits here."""

    def close(self) -> None:
        """Nothing happens: the file is closed once it has reached the disk."""
