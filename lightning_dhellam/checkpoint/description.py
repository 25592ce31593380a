"""What a checkpoint says of itself: `topology.json`."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

from lightning_dhellam.checkpoint.content import REMEDY
from lightning_dhellam.files import read_json, save_text
from lightning_dhellam.parallel.context import ParallelContext
from lightning_dhellam.plan.placement import Placement
from lightning_dhellam.remote import Folder, RemotePath

TOPOLOGY = "topology.json"
MODEL = "model"
"""Where the description has the model."""
ABOUT = "dhellam"
"""Where a file of Lightning's own has what a description has, as far as it knows."""
FILES = "files"
"""Where it has the size and the checksum of every file."""
INSIDE = "folder"
"""Where it has the name of the folder inside that the files are in, if they are in one."""
FROM = "checkpoint"
"""Where a state of an optimizer that is yet to be read has the path of its checkpoint."""
FORMAT = 2
_CHECKSUM = "checksum"
SAME = "use the same value"
ALONE = (
    f"{SAME} to go on training; or train anew from its weights alone, by"
    " trainer.validate(module, data, ckpt_path=…) and then trainer.fit(module, data), or by"
    " Runner.load before Runner.optimizer"
)
"""What to do where the weights fit, and the optimizer's state does not."""


def read_topology(path: Folder) -> dict[str, Any]:
    """Sizes and settings of the run that wrote a checkpoint, and what else it says of itself.

    Raises:
        ValueError: `path` is not a checkpoint, is damaged, or a newer version has written it.
    """
    file = path / TOPOLOGY
    if not file.is_file():
        kind = f"has no {TOPOLOGY}" if path.is_dir() else "is not a folder"
        raise ValueError(
            f"checkpoint {path} {kind if path.exists() else 'does not exist'}: give a folder that"
            " a run with DHellamStrategy wrote"
        )
    fields = read_json(file, "description of a checkpoint", REMEDY)
    if fields.get(_CHECKSUM, _sum(fields)) != _sum(fields):
        raise ValueError(
            f"{file} is damaged: its checksum is not that of what was written: {REMEDY}"
        )
    version = fields.get("format", 1)
    if not isinstance(version, int) or version > FORMAT:
        raise ValueError(
            f"checkpoint {path} has format {version}, and this version of lightning-dhellam reads"
            f" up to {FORMAT}: use the version that wrote it, or a newer one"
        )
    return fields


def contents_of(path: Folder) -> Folder:
    """The folder that the files of a checkpoint are in: where nothing can be renamed, one inside.

    Raises:
        ValueError: as `read_topology`.
    """
    return inside_of(path, read_topology(path))


def inside_of(path: Folder, known: Mapping[str, Any]) -> Folder:
    """The folder that the files are in, of what `read_topology` has read of a checkpoint."""
    inside = known.get(INSIDE)
    return path if inside is None else path / inside


def check_present(path: Folder) -> None:
    """Refuse a checkpoint of which a file is missing or has another size than was written.

    Raises:
        ValueError: the same, or `path` is not a checkpoint. Checksums are compared when it is read.
    """
    for name, (size, _) in read_topology(path).get(FILES, {}).items():
        check_size(path / name, size)


def check_size(file: Folder, size: int) -> None:
    """Refuse a file of a checkpoint that is missing, or does not have the size that was written."""
    if not file.is_file():
        raise ValueError(f"checkpoint {file.parent} has no {file.name}: {REMEDY}")
    found = file.stat().st_size
    if found != size:
        raise ValueError(
            f"{file} is damaged: it has {found} bytes, and {size} were written: {REMEDY}"
        )


def holds_state(path: Folder) -> bool:
    """Whether a checkpoint has the state of an optimizer, so that training can go on."""
    return "optimizer" in read_topology(path)


def save_description(folder: Folder, fields: Mapping[str, Any]) -> None:
    """Write what `read_topology` reads, with a checksum of it."""
    known = {"format": FORMAT, **fields}
    text = json.dumps({**known, _CHECKSUM: _sum(known)}, indent=2) + "\n"
    if isinstance(folder, RemotePath):
        (folder / TOPOLOGY).write_bytes(text.encode())
    else:
        save_text(folder / TOPOLOGY, text)


def _sum(fields: Mapping[str, Any]) -> str:
    own = {name: value for name, value in fields.items() if name != _CHECKSUM}
    return f"{zlib.crc32(json.dumps(own, sort_keys=True).encode()):08x}"


def sizes_of(context: ParallelContext) -> dict[str, Any]:
    """The sizes of a run, by the names that the user knows."""
    topology = context.topology
    return {
        "tensor_parallel_size": topology.tp_size,
        "pipeline_parallel_size": topology.pp_size,
        "pipeline_split": list(context.pipeline_split) if topology.pp_size > 1 else None,
        "pipeline_placement": list(context.placement.stage_of) if topology.pp_size > 1 else None,
        "context_parallel_size": topology.cp_size,
        "data_parallel_size": topology.dp_size,
        "expert_parallel_size": topology.ep_size,
        "expert_tensor_parallel_size": topology.etp_size,
    }


def check_same(path: Folder, mine: Mapping[str, Any], remedy: str = SAME) -> None:
    """Refuse a checkpoint in which one of the fields `mine` is another.

    Raises:
        ValueError: with both values.
    """
    saved = _with_older(read_topology(path))
    for name in mine:
        if saved.get(name) != mine[name]:
            raise ValueError(
                f"checkpoint {path} was written with {name}={saved.get(name)}, this run has"
                f" {name}={mine[name]}: {remedy}"
            )


def is_of_sizes(known: Mapping[str, Any], context: ParallelContext) -> bool:
    """Whether a checkpoint that says this of itself was written by a run of the same sizes."""
    saved, mine = _with_older(known), sizes_of(context)
    return {name: saved.get(name) for name in mine} == mine


def _with_older(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a description, with what every run had when older ones were written."""
    stages = saved.get("pipeline_parallel_size", 1)
    older = {
        "context_parallel_size": 1,
        "expert_parallel_size": 1,
        "expert_tensor_parallel_size": saved.get("tensor_parallel_size", 1),
        "pipeline_placement": [*Placement.folded(stages).stage_of] if stages > 1 else None,
    }
    return {**older, **saved}


def check_settings(path: Folder, settings: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose optimizer a run with `settings` cannot go on with.

    Raises:
        ValueError: it holds weights only, or one of the settings is another.
    """
    if not set(settings) & set(read_topology(path)):
        raise ValueError(weights_only(path))
    check_same(path, settings, ALONE)


def weights_only(path: Folder) -> str:
    """What is said of a checkpoint without the state of an optimizer."""
    return (
        f"checkpoint {path} holds weights only: training cannot go on from it; start a new run"
        " from these weights, or save with save_weights_only=False"
    )
