"""Which tensors of a model go into which of its files, as transformers deals them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from lightning_dhellam.models.conversion import Shape
from lightning_dhellam.models.stored import WHOLE

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Shard:
    """One file of weights.

    Attributes:
        name: of the file.
        tensors: that are in it, in order.
    """

    name: str
    tensors: tuple[str, ...]


def shards(shapes: Iterable[tuple[str, Shape]], width: int, most: int) -> list[Shard]:
    """Deal tensors to files, in order: a file is full before the next begins.

    Args:
        shapes: of each tensor.
        width: bytes of an element.
        most: bytes of a file. A tensor that is larger has a file of its own.
    """
    dealt: list[list[str]] = []
    size = most
    for name, shape in shapes:
        own = prod(shape) * width
        if not dealt or size + own > most:
            dealt.append([])
            size = 0
        dealt[-1].append(name)
        size += own
    if len(dealt) == 1:
        return [Shard(WHOLE, tuple(dealt[0]))]
    stem = WHOLE.removesuffix(".safetensors")
    return [
        Shard(f"{stem}-{number:05d}-of-{len(dealt):05d}.safetensors", tuple(names))
        for number, names in enumerate(dealt, 1)
    ]


def index_of(every: Iterable[Shard], total: int) -> Mapping[str, object]:
    """What the index of several files holds. `total` are the bytes of all tensors."""
    places = {name: shard.name for shard in every for name in shard.tensors}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}


def bytes_of(size: int | str) -> int:
    """A size that a user has given, such as `5GB` or a number of bytes.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?B)?", str(size).strip().upper())
    number = float(found[1]) * _UNITS.get(found[2] or "", 1) if found else 0
    if number < 1:
        raise ValueError(
            f"max_shard_size={size!r} is no size of a file: give one such as '5GB', or bytes"
        )
    return int(number)
