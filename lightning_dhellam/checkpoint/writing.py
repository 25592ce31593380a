"""Writes checkpoints as `folder` describes them: prepared by all ranks, then written, then renamed.

What is prepared has its own copy of whatever is no tensor, and tensors as they are; with `stage`
copies of these as well. Then it may be written by a thread, while training goes on.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from lightning_dhellam.checkpoint import content, stepped, weights
from lightning_dhellam.checkpoint.checksums import Checksums, crc32
from lightning_dhellam.checkpoint.description import (
    FILES,
    INSIDE,
    MODEL,
    save_description,
    sizes_of,
)
from lightning_dhellam.checkpoint.folder import COMMON, REST, own_name
from lightning_dhellam.checkpoint.shares import Shares
from lightning_dhellam.checkpoint.staging import Staging
from lightning_dhellam.checkpoint.storage import Planned
from lightning_dhellam.files import WriteError, put_in_place, write_atomically
from lightning_dhellam.leftovers import clear, name_digest
from lightning_dhellam.parallel.collectives import of_all_ranks, to_first, try_together
from lightning_dhellam.parallel.context import ParallelContext
from lightning_dhellam.remote import Folder, RemotePath

_PARTS = "parts-"
"""What folders inside a checkpoint begin with."""


@dataclass
class Prepared:
    """A checkpoint of which this rank has all that it is to write.

    Attributes:
        path: of the folder.
        first: whether this is the first rank.
        plain: by name the content of the files that torch's distributed checkpoint does not write.
        tensors: what this rank writes of weights and of the optimizer's state.
        description: what the checkpoint says of itself, but for its files.
        aside: where they are written to.
    """

    path: Folder
    first: bool
    plain: dict[str, bytes]
    tensors: Planned
    description: dict[str, Any]
    aside: Folder

    def stage(self, staging: Staging) -> None:
        """Copy what training is about to change."""
        pieces = self.tensors.pieces
        late = {name for name in pieces if name.startswith(stepped.PREFIX)}
        self.tensors.pieces = staging.copy(pieces, late)


def save(
    path: Folder,
    context: ParallelContext,
    common: Mapping[str, Any],
    module_state: Mapping[str, Any],
    shares: Shares,
    state: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint. Every rank must call this, with the same path on a shared file system.

    Args and errors are those of `prepare` and `write`.
    """
    prepared = prepare(path, context, common, module_state, shares, state, settings, model)
    write(prepared, host_group(context))


def prepare(
    path: Folder,
    context: ParallelContext,
    common: Mapping[str, Any],
    module_state: Mapping[str, Any],
    shares: Shares,
    state: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
) -> Prepared:
    """What this rank is to write of a checkpoint. Every rank must call this.

    Args:
        path: of the folder.
        context: groups of this rank.
        common: what every rank has alike.
        module_state: this rank's weights, and what else a module's state has, by names among all.
        shares: how this rank's parameters lie.
        state: this rank's, of the optimizer.
        settings: what the state was made with, by the names that the user knows.
        model: what the weights are of.

    Raises:
        ValueError: on every rank: something cannot be saved so that it could be read again.
    """
    group, first = host_group(context), context.topology.rank == 0
    of_module = weights.to_save(module_state, shares, context.topology, group)
    of_optimizer = stepped.Saved() if state is None else stepped.to_save(state, shares)
    rests = of_all_ranks(
        (of_module.rest, weights.described(shares), [*of_module.own], of_optimizer.rest), group
    )
    aside = aside_of(path, of_all_ranks(uuid.uuid4().hex, group)[0])
    plain: dict[str, bytes] = {}

    def encode() -> None:
        own = {"state_dict": of_module.own, "optimizer": of_optimizer.own}
        found: dict[str, Mapping[str, Any]] = {own_name(context): own} if any(own.values()) else {}
        if first:
            found[COMMON] = common
            found[REST] = _merged(rests, with_state=state is not None)
        plain.update({name: content.encoded(name, value) for name, value in found.items()})

    _, failures = try_together(encode, group)
    if failures:
        raise _not_written(path, failures)
    tensors = {**of_module.tensors, **of_optimizer.tensors}
    description = {**sizes_of(context), **(settings or {}), MODEL: model}
    return Prepared(path, first, plain, Planned(aside, tensors, group), description, aside)


def write(prepared: Prepared, group: ProcessGroup | None) -> None:
    """Write what was prepared. Every rank of `group` must call this, in whatever thread.

    Raises:
        WriteError: a rank could not write; on every rank, and the path is as it was before.
    """
    path, first, aside = prepared.path, prepared.first, prepared.aside
    checksums: Checksums = {}
    written: list[Any] = []

    def make_room() -> None:
        if first and isinstance(path, Path) and isinstance(aside, Path):
            clear(path.parent)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

    def write_own() -> None:
        for name, data in prepared.plain.items():
            _put(aside / name, data)
            checksums[name] = len(data), f"{crc32(data, 0):08x}"
        written.append(prepared.tensors.write())
        checksums.update(prepared.tensors.checksums)

    def publish() -> None:
        of_ranks = to_first((written[0], checksums), group)
        if of_ranks is not None:
            prepared.tensors.finish([files for files, _ in of_ranks])
            files = _union([prepared.tensors.checksums, *(sums for _, sums in of_ranks)])
            _publish(prepared, files)

    for step in (make_room, write_own, publish):
        _, failures = try_together(step, group)
        if failures:
            if first:
                _take_away(aside)
            of_all_ranks(None, group)  # none may look before the folder is gone
            raise _not_written(path, failures)


def _put(file: Folder, data: bytes) -> None:
    if isinstance(file, RemotePath):
        file.write_bytes(data)
    else:
        write_atomically(file, data)


def _publish(prepared: Prepared, files: Checksums) -> None:
    """Give what all ranks have written its name, or replace what says which files are meant."""
    path, aside = prepared.path, prepared.aside
    if isinstance(path, Path) and isinstance(aside, Path):
        save_description(aside, {**prepared.description, FILES: files})
        put_in_place(aside, path)
    elif isinstance(path, RemotePath):
        inside = {f"{aside.name}/{name}": found for name, found in files.items()}
        save_description(path, {**prepared.description, INSIDE: aside.name, FILES: inside})
        for other in path.iterdir():  # of the one before, or of a save that was killed
            if other.name.startswith(_PARTS) and other != aside:
                _take_away(other)


def _take_away(place: Folder) -> None:
    if isinstance(place, RemotePath):
        with suppress(OSError):
            place.remove()
    else:
        shutil.rmtree(place, ignore_errors=True)


def _not_written(path: Folder, failures: list[Any]) -> Exception:
    reasons = "; ".join(failure.text for failure in failures)
    kind = ValueError if all(failure.mistake for failure in failures) else WriteError
    return kind(f"checkpoint {path} was not written: {reasons}")


def host_group(context: ParallelContext) -> ProcessGroup | None:
    """All ranks of the run, for values in host memory; None if this is the only one."""
    if context.topology.world_size == 1:
        return None
    return context.host_group or context.world_group


def _merged(rests: list[Any], *, with_state: bool) -> dict[str, Any]:
    """What all ranks have together of what is no tensor."""
    of_modules, lying, alone, of_optimizers = zip(*rests, strict=True)
    return {
        "state_dict": _union(of_modules),
        "shares": _union(lying),
        "alone": [name for names in alone for name in names],
        "optimizer": stepped.merged(of_optimizers) if with_state else None,
    }


def _union(mappings: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for mapping in mappings:
        found = {**mapping, **found}
    return found


def aside_of(path: Folder, token: str = "") -> Folder:
    """Where a checkpoint is written to before it is whole.

    Its name tells nothing of the checkpoint's: a job that goes on under SLURM takes the highest
    number of all names with `hpc_ckpt_` in them, hidden ones as well. Where a folder cannot be
    renamed in one step, as in object stores, files are in a folder inside, of another name for each
    save; the description, written last and at once, says which.

    Args:
        path: of the checkpoint.
        token: of this save.
    """
    if isinstance(path, RemotePath):
        return path / f"{_PARTS}{token}"
    return path.with_name(f".{name_digest(path)}.partial")
