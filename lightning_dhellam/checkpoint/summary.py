"""What a checkpoint is, read from its files alone, and whether they are as they were written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_dhellam.checkpoint.checksums import check_file
from lightning_dhellam.checkpoint.description import (
    FILES,
    INSIDE,
    MODEL,
    contents_of,
    read_topology,
)
from lightning_dhellam.checkpoint.folder import load_common
from lightning_dhellam.checkpoint.reading import read_metadata
from lightning_dhellam.checkpoint.weights import PREFIX
from lightning_dhellam.remote import Folder

_SIZES = "_parallel_size"


class Summary(NamedTuple):
    """A checkpoint.

    Attributes:
        version: of its form.
        files: how many it has.
        bytes: of all files.
        sizes: those above 1 of the run that wrote it, by the names that the user knows.
        settings: what the optimizer's state was made with; empty where there is none.
        step: optimizer steps that were done.
        epoch: that was under way or done.
        samples: of the training data that were given out by then, if the loader counts them.
        made_by: version of Lightning.
        weights: tensors of the module, of all ranks together.
        values: how many numbers these have, those that pad the vocabulary included.
        types: of these, most numbers first.
        state: bytes of the tensors of the optimizer's state.
        origin: folder of Hugging Face that the weights are from, if any.
    """

    version: int
    files: int
    bytes: int
    sizes: dict[str, int]
    settings: dict[str, Any]
    step: int
    epoch: int
    samples: int | None
    made_by: str
    weights: int
    values: int
    types: tuple[str, ...]
    state: int
    origin: str | None


def summarise(folder: Folder) -> Summary:
    """Read a checkpoint's description, and every file to its end.

    Raises:
        ValueError: `folder` is no checkpoint, is not whole, or is of the form of version 0.1, which
            has neither checksums nor whole tensors.
    """
    known = read_topology(folder)
    files: dict[str, tuple[int, str]] = known.get(FILES, {})
    if not files:
        raise ValueError(
            f"checkpoint {folder} is of the form of version 0.1, which says nothing of its files:"
            " load it with the sizes that it was saved with, and save it again"
        )
    for name, (size, digest) in files.items():
        check_file(folder / name, size, digest)
    common = load_common(folder)
    weights = values = state = 0
    types: dict[str, int] = {}
    for name, tensor in read_metadata(contents_of(folder)).state_dict_metadata.items():
        if not isinstance(tensor, TensorStorageMetadata):
            continue  # of values that are no tensors
        count = tensor.size.numel()
        if name.startswith(PREFIX):
            kind = str(tensor.properties.dtype).removeprefix("torch.")
            types[kind] = types.get(kind, 0) + count
            weights, values = weights + 1, values + count
        else:
            state += count * tensor.properties.dtype.itemsize
    sizes = {n: v for n, v in known.items() if n.endswith(_SIZES) and v and v > 1}
    left_out = (FILES, INSIDE, MODEL, "format", "checksum")
    others = (*left_out, "pipeline_split", "pipeline_placement")
    return Summary(
        known.get("format", 1),
        len(files),
        sum(size for size, _ in files.values()),
        sizes,
        {n: v for n, v in known.items() if n not in others and not n.endswith(_SIZES)},
        int(common.get("global_step", 0)),
        int(common.get("epoch", 0)),
        _samples(common.get("loops", {})),
        str(common.get("pytorch-lightning_version", "unknown")),
        weights,
        values,
        tuple(sorted(types, key=lambda kind: -types[kind])),
        state,
        common.get("origin"),
    )


def _samples(loops: Any) -> int | None:
    """What a loader that counts samples has saved, somewhere in the state of the loops."""
    if isinstance(loops, Mapping):
        if isinstance(loops.get("samples"), int):
            return int(loops["samples"])
        loops = list(loops.values())
    if isinstance(loops, list | tuple):
        return next((n for n in map(_samples, loops) if n is not None), None)
    return None
