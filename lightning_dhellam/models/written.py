"""Safetensors files written a tensor at a time, where the library wants all of a file at once.

A file is eight bytes that say how long its header is, the header in JSON, and the tensors one
behind the other (https://huggingface.co/docs/safetensors). Since every shape is known before any
tensor is there, the header can come first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.files import in_parts, write_error
from lightning_dhellam.models.conversion import Shape
from lightning_dhellam.models.stored import TYPES

_CODES = {name: code for code, name in TYPES.items()}
_ALIGNED = 8
"""Of which the length of a header is a multiple."""


class TensorFile:
    """A file that takes its tensors in order.

    Attributes:
        path: of the file.
        needed: bytes that it will have.
        written: bytes that it has.
    """

    def __init__(self, path: Path, file: Any, shapes: Mapping[str, Shape], dtype: torch.dtype):
        self.path, self.written = path, 0
        self._file, self._dtype = file, dtype
        self._left = dict(shapes)
        header = _header(shapes, dtype)
        self.needed = len(header) + sum(map(prod, shapes.values())) * dtype.itemsize
        self._write(header)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, of whatever type and device.

        Raises:
            WriteError: there is no room, or the disk fails.
        """
        expected = next(iter(self._left.items()))
        assert (name, tuple(tensor.shape)) == expected, f"{name} where {expected} is due"
        del self._left[name]
        whole = tensor.detach().to("cpu", self._dtype).contiguous()
        self._write(whole.flatten().view(torch.uint8).numpy())

    def _write(self, data: Any) -> None:
        try:
            for done in in_parts(self._file, memoryview(data)):
                self.written += done
        except OSError as error:
            raise write_error(self.path, error, self.written, self.needed) from error


@contextmanager
def tensor_file(
    path: Path, shapes: Mapping[str, Shape], dtype: torch.dtype
) -> Iterator[TensorFile]:
    """Write a file of tensors of one type, which are put into it in the order of `shapes`.

    Raises:
        WriteError: there is no room, or the disk fails.
    """
    with path.open("wb", buffering=0) as file:
        yield TensorFile(path, file, shapes, dtype)


def _header(shapes: Mapping[str, Shape], dtype: torch.dtype) -> bytes:
    code = _CODES[str(dtype).removeprefix("torch.")]
    # transformers 4 asks for the format.
    said: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + prod(shape) * dtype.itemsize
        said[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return len(text).to_bytes(8, "little") + text
