"""Tensors written to files of torch's distributed checkpoint, each file with a checksum.

Any tool that reads such folders (`torch.distributed.checkpoint`) reads these.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.serialization import get_crc32_options, set_crc32_options

from lightning_dhellam.checkpoint.checksums import AT_ONCE, Checksums, crc32
from lightning_dhellam.checkpoint.pieces import Pieces
from lightning_dhellam.files import in_parts, write_error
from lightning_dhellam.parallel.collectives import to_first
from lightning_dhellam.remote import Folder, RemotePath


class Planned:
    """What this rank writes of some tensors.

    Of what several ranks have one writes each part, so that all write about as much. Every rank of
    `group` must make one, at the same place.

    Args:
        folder: that they are to lie in.
        tensors: what this rank has of them.
        group: of all ranks, for values in host memory; None where there are no others.

    Attributes:
        pieces: what it writes, by a name for each; it may be replaced by copies.
    """

    def __init__(
        self, folder: Folder, tensors: Mapping[str, Pieces], group: dist.ProcessGroup | None
    ) -> None:
        self._writer = _Writer(folder)
        self._planner = _SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        rank = 0 if group is None else group.rank()
        self._planner.set_up_planner(dict(tensors), is_coordinator=rank == 0)
        self._writer.set_up_storage_writer(rank == 0, rank=rank)
        self._metadata: Metadata | None = None
        plan = _through_first(self._planner.create_local_plan(), self._plan_all, group)
        self._plan: SavePlan = self._planner.finish_plan(plan)
        self.pieces = {
            _name_of(item.index): tensors[item.index.fqn].piece(item.index)
            for item in self._plan.items
        }

    def _plan_all(self, plans: list[SavePlan]) -> list[SavePlan]:
        plans, self._metadata = self._planner.create_global_plan(plans)
        return self._writer.prepare_global_plan(plans)

    def write(self) -> Any:
        """Write this rank's file. Returns what `finish` takes of all ranks.

        Raises:
            WriteError: there is no room for it, or the disk fails.
        """
        self._planner.copies = self.pieces
        with _summed_once():
            return self._writer.write_data(self._plan, self._planner).value()

    def finish(self, written: list[Any]) -> None:
        """Write what describes all files, on the first rank, of what `write` returned on each."""
        assert self._metadata is not None
        self._writer.finish(self._metadata, written)

    @property
    def checksums(self) -> Checksums:
        """Checksums of what this rank has written."""
        return self._writer.files.checksums


@contextmanager
def _summed_once() -> Iterator[None]:
    """Inside, torch does not sum what it saves: the whole file has a checksum."""
    usual = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(usual)


def _name_of(index: MetadataIndex) -> str:
    return f"{index.fqn} at {index.offset}"


def _through_first(
    value: Any, part: Callable[[list[Any]], list[Any]], group: dist.ProcessGroup | None
) -> Any:
    """What the first rank makes for this one of the values of all ranks."""
    if group is None:
        return part([value])[0]
    values = to_first(value, group)
    made: list[Any] = [None] * group.size()
    if values is not None:
        try:
            made = part(values)
        except Exception as error:  # the others wait for what it makes
            made = [error] * group.size()
    found: list[Any] = [None]
    dist.scatter_object_list(found, made, group=group, group_src=0)
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


class _SavePlanner(DefaultSavePlanner):
    """Finds what is to be written among the copies of pieces."""

    copies: Mapping[str, Tensor]

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.copies[_name_of(index)]


class _Writer(dcp.FileSystemWriter):
    """Writes this rank's file, and keeps checksums of all that it has written."""

    def __init__(self, folder: Folder) -> None:
        super().__init__(str(folder), sync_files=False)
        self.fs = self.files = _Files()
        self.path = folder  # torch's own are of this machine

    def storage_meta(self) -> StorageMeta:
        # It is pickled: a path of ours could not be read by others.
        return StorageMeta(checkpoint_id=str(self.path), save_id=self.save_id)

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
        assert mode == "wb"
        place = path if isinstance(path, RemotePath) else Path(path)
        if isinstance(place, RemotePath):
            place.parent.mkdir()
        with place.open("wb", buffering=0) as file:
            written = _Written(file)
            try:
                yield written
                if isinstance(place, Path):
                    os.fsync(file.fileno())
            except Exception as error:
                found = written.error or error
                if not isinstance(found, OSError):
                    raise
                about = "about " if self.needed else ""
                raise write_error(place, found, written.size, self.needed, about) from error
        name = place.name.removesuffix(".tmp")
        self.checksums[name] = written.size, f"{written.checksum:08x}"

    # What torch does with a file besides, of whatever file system.

    def concat_path(self, path: Any, suffix: str) -> Any:
        return path / suffix

    def exists(self, path: Any) -> bool:
        return bool(path.exists())

    def rename(self, path: Any, new_path: Any) -> None:
        path.rename(new_path)


class _Written:
    """What torch writes to. Attributes: size and checksum of what was, and the disk's error."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.size = 0
        self.checksum = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        whole = memoryview(data).cast("B")
        try:
            for start in range(0, whole.nbytes, AT_ONCE):
                part = whole[start : start + AT_ONCE]
                self.checksum = crc32(part, self.checksum)
                for done in in_parts(self.file, part):
                    self.size += done
        except OSError as error:
            self.error = error
            raise
        return whole.nbytes

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        """Nothing waits here."""

    def close(self) -> None:
        """Nothing happens: the file is closed once it has reached the disk."""
