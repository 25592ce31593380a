"""A checkpoint as one process would have saved it under one of Lightning's own strategies.

Such a file has whole tensors by name, and the optimizer's state by the numbers of parameters, in
the order in which `configure_optimizers` was given them. Here that order is the one in which the
ranks were; with pipeline or expert parallelism each rank has its own parameters only, and they are
put into the order of the model.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from lightning_dhellam.checkpoint import content
from lightning_dhellam.checkpoint.checksums import check_file
from lightning_dhellam.checkpoint.description import ABOUT, FILES, MODEL, contents_of, read_topology
from lightning_dhellam.checkpoint.folder import REST, load_common
from lightning_dhellam.checkpoint.from_file import NAMES
from lightning_dhellam.checkpoint.model import config_of, saved_model
from lightning_dhellam.checkpoint.order import in_order
from lightning_dhellam.checkpoint.pieces import Pieces, empty_place
from lightning_dhellam.checkpoint.reading import load_pieces, read_metadata
from lightning_dhellam.checkpoint.stepped import MASTER, split_place, values_of
from lightning_dhellam.checkpoint.weights import PREFIX
from lightning_dhellam.files import put_in_place, sync_files
from lightning_dhellam.remote import Folder

_HOW = {"foreach": None, "fused": None, "capturable": False, "differentiable": False}
"""How an optimizer computes, which checkpoints leave to each machine."""
_TABLES = re.compile(r"(.*\.)?(embedding\.word_embeddings|output_layer)\.[^.]+")
"""Names of what has a row for each word."""


class WholeCheckpoint(NamedTuple):
    """What a file of Lightning holds.

    Attributes:
        content: of the file.
        lines: what the folder has and the file cannot have.
    """

    content: dict[str, Any]
    lines: tuple[str, ...]


def read_whole(folder: Folder, *, with_state: bool = True) -> WholeCheckpoint:
    """Read a checkpoint as one process would have saved it. Takes memory for all of it.

    Weights are the master weights, where there are any. Every file is compared with its checksum.

    Args:
        folder: of the checkpoint.
        with_state: whether the optimizer's state is read, if there is one.

    Raises:
        ValueError: it is damaged, of the form of version 0.1, or has tensors that differ between
            ranks and are no parameters.
    """
    known = read_topology(folder)
    if FILES not in known:
        raise ValueError(
            f"checkpoint {folder} is of the form of version 0.1, a file per rank: load it with the"
            " sizes that it was saved with, and convert what is saved then"
        )
    for name, (size, digest) in known[FILES].items():
        check_file(folder / name, size, digest)
    inside = contents_of(folder)
    metadata, rest = read_metadata(inside), content.read(inside / REST)
    if rest["alone"]:
        raise ValueError(
            f"checkpoint {folder}: '{rest['alone'][0]}' is no parameter, and each rank had another:"
            " it loads with the sizes that it was saved with only"
        )
    resized = _resizing(folder)
    tensors = _read(
        inside, metadata, resized, lambda name: name.startswith(PREFIX) or _is_master(name)
    )
    weights = {n.removeprefix(PREFIX): t for n, t in tensors.items() if n.startswith(PREFIX)}
    masters = {split_place(n)[1]: t for n, t in tensors.items() if not n.startswith(PREFIX)}
    names = in_order([*rest["shares"], *weights])
    state = {n: masters.get(n, weights.get(n)) for n in names if n in weights}
    found = {**load_common(folder), "state_dict": {**state, **rest["state_dict"]}}
    found[ABOUT] = {MODEL: known.get(MODEL)}
    lines: tuple[str, ...] = ()
    if with_state and rest["optimizer"] is not None:
        alone = rest["optimizer"]["alone"]
        if alone:
            lines = (f"{alone[0]} cannot be put together, so the optimizer's state is left out",)
        else:
            of_optimizer = _read(
                inside, metadata, resized, lambda n: not n.startswith(PREFIX) and not _is_master(n)
            )
            several = any(
                known.get(f"{kind}_parallel_size", 1) > 1 for kind in ("pipeline", "expert")
            )
            found["optimizer_states"] = [_numbered(rest["optimizer"], of_optimizer, several)]
    return WholeCheckpoint(found, lines)


def save_file(path: Path, found: Mapping[str, Any]) -> None:
    """Write a file of Lightning's, whole or not at all.

    Raises:
        WriteError: there is no room for it, or the disk fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.partial-") as aside:
        partial = Path(aside) / path.name
        content.write(partial, found)
        sync_files(Path(aside))
        put_in_place(partial, path)


def _is_master(place: str) -> bool:
    return not place.startswith(PREFIX) and split_place(place)[0] == MASTER


def _resizing(folder: Folder) -> Callable[[str, Tensor], Tensor]:
    """What gives tables of the vocabulary as many rows as one process has."""
    found = saved_model(folder)
    if found is None:
        return lambda name, tensor: tensor
    config = config_of(found)
    saved = config.padded_vocab_size(read_topology(folder).get("tensor_parallel_size", 1))
    rows = config.padded_vocab_size(1)

    def resized(name: str, tensor: Tensor) -> Tensor:
        is_table = _TABLES.fullmatch(name) and tensor.dim() and len(tensor) == saved
        return tensor[:rows].clone() if is_table and saved > rows else tensor

    return resized


def _read(
    folder: Folder,
    metadata: Metadata,
    resized: Callable[[str, Tensor], Tensor],
    wanted: Callable[[str], bool],
) -> dict[str, Tensor]:
    """The whole tensors of some places."""
    tensors, pieces = {}, {}
    for place, saved in metadata.state_dict_metadata.items():
        if isinstance(saved, TensorStorageMetadata) and wanted(place):
            tensors[place] = empty_place(saved.size, saved.properties.dtype)
            start = (0,) * len(saved.size)
            pieces[place] = Pieces(saved.size, saved.properties.dtype, [(start, tensors[place])])
    load_pieces(folder, metadata, pieces)
    return {place: resized(_name_in(place), tensor) for place, tensor in tensors.items()}


def _name_in(place: str) -> str:
    return place.removeprefix(PREFIX) if place.startswith(PREFIX) else split_place(place)[1]


def _numbered(
    saved: Mapping[str, Any], tensors: Mapping[str, Tensor], several: bool
) -> dict[str, Any]:
    """The state of an optimizer in torch's form, by numbers of parameters."""
    by_name = {name: own for name, own in values_of(saved).items() if own}
    for place, tensor in tensors.items():
        key, name = split_place(place)
        by_name.setdefault(name, {})[key] = tensor
    groups, first = [], 0
    numbers: dict[str, int] = {}
    for group in saved["groups"]:
        names = in_order(group[NAMES]) if several else list(group[NAMES])
        numbers |= {name: first + place for place, name in enumerate(names)}
        own = [*range(first, first + len(names))]
        groups.append({**_HOW, **group, NAMES: names, "params": own})
        first += len(names)
    state = {numbers[name]: by_name[name] for name in numbers if name in by_name}
    return {"state": {**state, **saved["other"]}, "param_groups": groups}
