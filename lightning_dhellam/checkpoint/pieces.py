"""Parts of tensors as torch's distributed checkpoint takes them: where each is in the whole one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType


class Pieces:
    """What a rank has of a tensor. Torch asks for it by the methods with underscores.

    Args:
        shape: of the whole tensor.
        dtype: of it.
        pieces: each with the place where it begins.
    """

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, pieces: Sequence[tuple[Any, Tensor]]
    ) -> None:
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self.pieces: Mapping[torch.Size, Tensor] = {torch.Size(at): piece for at, piece in pieces}

    def size(self) -> torch.Size:
        """The shape of the whole tensor."""
        return self.shape

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(at, piece.shape) for at, piece in self.pieces.items()]

    def piece(self, index: MetadataIndex) -> Tensor:
        """The piece that begins where `index` says."""
        assert index.offset is not None
        return self.pieces[index.offset]


def empty_place(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of zeros on the host that is to be filled.

    In numpy's memory, which asks the system for large pages: filling it for the first time is two
    to three times as fast as torch's own.
    """
    count = prod(shape)
    if not count:
        return torch.zeros(tuple(shape), dtype=dtype)
    memory = numpy.zeros(count * dtype.itemsize, numpy.uint8)
    return torch.from_numpy(memory).view(dtype).view(tuple(shape))
