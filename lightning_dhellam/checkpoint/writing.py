"""Writes checkpoints as `folder` describes them: prepared by all ranks, then written, then renamed.

When it is prepared, what all ranks have alike is encoded, and all else is as it is: `stage` copies
that. Then a thread may write it, while training goes on.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
from lightning_dhellam.checkpoint.finite import Finiteness
from lightning_dhellam.checkpoint.folder import COMMON, REST, own_name
from lightning_dhellam.checkpoint.kept import on_host, tensors_in, with_copies
from lightning_dhellam.checkpoint.shares import Shares
from lightning_dhellam.checkpoint.staging import Staging
from lightning_dhellam.checkpoint.storage import Planned
from lightning_dhellam.files import WriteError, put_in_place, write_atomically
from lightning_dhellam.leftovers import clear, name_digest
from lightning_dhellam.parallel.collectives import of_all_ranks, to_first, together, try_together
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
        common: what every rank has alike, as it is in its file.
        tensors: what this rank writes of weights and of the optimizer's state.
        rest: what else this rank has of both.
        own_name: the file of what only this rank has.
        description: what the checkpoint says of itself, but for its files.
        aside: where they are written to.
        finite: which weights are finite: nothing is written unless all are.
    """

    path: Folder
    first: bool
    common: bytes
    tensors: Planned
    rest: Rest
    own_name: str
    description: dict[str, Any]
    aside: Folder
    finite: Finiteness | None = None

    def stage(self, staging: Staging) -> None:
        """Copy what training is about to change. The host does not wait for the device."""
        pieces, rest = self.tensors.pieces, self.rest
        flags = [] if self.finite is None else [self.finite.flags]
        late = dict(enumerate(tensors_in(rest.stepped)))
        stepped_only = {id(tensor) for tensor in late.values()}
        others = tensors_in([rest.of_module, rest.of_optimizer, flags])
        besides = dict(enumerate(one for one in others if id(one) not in stepped_only))
        every = {
            **pieces,
            **{f"{number}": tensor for number, tensor in besides.items()},
            **{f"{stepped.PREFIX}{number}": tensor for number, tensor in late.items()},
        }
        copies = staging.copy(every, {name for name in every if name.startswith(stepped.PREFIX)})
        self.tensors.pieces = {name: copies[name] for name in pieces}
        copied = {id(tensor): copies[name] for name, tensor in every.items() if name not in pieces}
        self.rest = with_copies(rest, copied)
        if self.finite is not None:
            self.finite.flags = copied[id(self.finite.flags)]


class Rest(NamedTuple):
    """What a rank has that is no part of a tensor which ranks share.

    Attributes:
        of_module: `rest`, what is no tensor, and `own`, what no other rank has, of its state.
        of_optimizer: the same of that of the optimizer.
        lying: how parameters lie.
        with_state: whether there is an optimizer's.
    """

    of_module: Mapping[str, Mapping[str, Any]]
    of_optimizer: Mapping[str, Mapping[str, Any]]
    lying: Mapping[str, Any]
    with_state: bool

    @property
    def stepped(self) -> list[Any]:
        """What only a step of the optimizer changes: what it keeps of parameters.

        Its groups may change before, as by a schedule of a learning rate that is a tensor.
        """
        return [self.of_optimizer["rest"].get("values", {}), self.of_optimizer["own"]]

    @property
    def own(self) -> dict[str, Any]:
        """What no other rank has; nothing if that is nothing."""
        own = {"state_dict": self.of_module["own"], "optimizer": self.of_optimizer["own"]}
        return own if any(own.values()) else {}

    def check(self, own_name: str) -> None:
        """Refuse what could not be read again, before there is anything to lose.

        Raises:
            ValueError: there is such a thing.
        """
        found = {"state_dict": self.of_module["rest"], "optimizer": self.of_optimizer["rest"]}
        for name, value in ((REST, found), (own_name, self.own)):
            content.check_readable(value, file=name)

    @property
    def told(self) -> Rest:
        """What the first rank hears: of what no other rank has the names."""
        return self._replace(
            of_module={**self.of_module, "own": dict.fromkeys(self.of_module["own"])},
            of_optimizer={**self.of_optimizer, "own": {}},
        )

    @classmethod
    def merged(cls, rests: Sequence[Rest]) -> dict[str, Any]:
        """What all ranks have together of what is no tensor."""
        of_optimizers = [rest.of_optimizer["rest"] for rest in rests]
        return {
            "state_dict": _union(rest.of_module["rest"] for rest in rests),
            "shares": _union(rest.lying for rest in rests),
            "alone": [name for rest in rests for name in rest.of_module["own"]],
            "optimizer": stepped.merged(of_optimizers) if rests[0].with_state else None,
        }


def save(
    path: Folder,
    context: ParallelContext,
    common: Mapping[str, Any],
    module_state: Mapping[str, Any],
    shares: Shares,
    state: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    finite: Finiteness | None = None,
) -> None:
    """Write a checkpoint. Every rank must call this, with the same path on a shared file system.

    Args and errors are those of `prepare` and `write`.
    """
    prepared = prepare(path, context, common, module_state, shares, state, settings, model, finite)
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
    finite: Finiteness | None = None,
) -> Prepared:
    """What this rank is to write of a checkpoint. Every rank must call this.

    The host waits for no device, unless there are tensors of one among `common`, or some that ranks
    of tensor parallelism compare: the next step can be asked for while it is still busy with this.

    Args:
        path: of the folder.
        context: groups of this rank.
        common: what every rank has alike.
        module_state: this rank's weights, and what else a module's state has, by names among all.
        shares: how this rank's parameters lie.
        state: this rank's, of the optimizer.
        settings: what the state was made with, by the names that the user knows.
        model: what the weights are of.
        finite: which weights are finite, if that matters.

    Raises:
        ValueError: on every rank: something cannot be saved so that it could be read again.
    """
    group, first = host_group(context), context.topology.rank == 0
    of_module = weights.to_save(module_state, shares, context.topology, group)
    of_optimizer = stepped.Saved() if state is None else stepped.to_save(state, shares)
    rest = Rest(
        {"rest": of_module.rest, "own": of_module.own},
        {"rest": of_optimizer.rest, "own": of_optimizer.own},
        weights.described(shares),
        state is not None,
    )
    aside = aside_of(path, of_all_ranks(uuid.uuid4().hex, group)[0])
    encoded: list[bytes] = []

    def encode() -> None:
        rest.check(own_name(context))
        encoded.append(content.encoded(COMMON, common) if first else b"")

    _, failures = try_together(encode, group)
    if failures:
        raise _not_written(path, failures)
    tensors = {**of_module.tensors, **of_optimizer.tensors}
    return Prepared(
        path,
        first,
        encoded[0],
        Planned(aside, tensors, group),
        rest,
        own_name(context),
        {**sizes_of(context), **(settings or {}), MODEL: model},
        aside,
        finite,
    )


def write(prepared: Prepared, group: ProcessGroup | None) -> None:
    """Write what was prepared. Every rank of `group` must call this, in whatever thread.

    Raises:
        ValueError: a weight is not finite; on every rank, and nothing was written.
        WriteError: a rank could not write; on every rank, and the path is as it was before.
    """
    path, first, aside = prepared.path, prepared.first, prepared.aside
    checksums: Checksums = {}
    written: list[Any] = []
    if prepared.finite is not None:
        together(partial(prepared.finite.check, path), group)
    rest = on_host(prepared.rest)
    rests = to_first(rest.told, group)

    def make_room() -> None:
        if first and isinstance(path, Path) and isinstance(aside, Path):
            clear(path.parent)
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

    def write_own() -> None:
        plain = (
            {prepared.own_name: content.encoded(prepared.own_name, rest.own)} if rest.own else {}
        )
        if rests is not None:
            plain[COMMON] = prepared.common
            plain[REST] = content.encoded(REST, Rest.merged(rests))
        for name, data in plain.items():
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
