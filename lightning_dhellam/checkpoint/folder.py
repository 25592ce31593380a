"""A checkpoint of a model-parallel run: a folder that loads with any parallel sizes.

    epoch=0-step=100.ckpt/
        topology.json   sizes and settings of the run that wrote it, its model, and a checksum of
                        every file
        common.pt       what every rank has alike: loops, callbacks, schedulers, hyperparameters
        rest.pt         what is no tensor of a state, and how parameters lie
        .metadata       where of which tensor a part is
        __3_0.distcp    parts of weights and of the optimizer's state, which rank 3 has written
        own-00003.pt    what only rank 3 had, if anything, for the same sizes only

Tensors are those of the whole model, whatever ranks had of them, by torch's distributed checkpoint.
Written aside and renamed when every rank is done, so that a folder of the final name is whole.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_dhellam.checkpoint import by_rank, content, from_file, stepped, weights
from lightning_dhellam.checkpoint.description import (
    ALONE,
    FILES,
    FROM,
    MODEL,
    SAME,
    check_same,
    check_settings,
    read_topology,
    save_description,
    sizes_of,
)
from lightning_dhellam.checkpoint.shares import Shares
from lightning_dhellam.checkpoint.storage import (
    Checksums,
    check_file,
    checksum,
    load_pieces,
    read_metadata,
    save_pieces,
)
from lightning_dhellam.files import WriteError, put_in_place, sync_files
from lightning_dhellam.parallel.collectives import of_all_ranks, together, try_together
from lightning_dhellam.parallel.context import ParallelContext
from lightning_dhellam.parallel.optimizer_state import Form

COMMON = "common.pt"
REST = "rest.pt"
_SHARDED = "distributed_optimizer"
"""What decides who has what of a state, and nothing else."""


def save(
    path: Path,
    context: ParallelContext,
    common: Mapping[str, Any],
    module_state: Mapping[str, Any],
    shares: Shares,
    state: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint. Every rank must call this, with the same path on a shared file system.

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
        WriteError: a rank could not write; on every rank, and `path` is as it was before.
        ValueError: the same, because something cannot be saved so that it could be read again.
    """
    aside, group = aside_of(path), context.world_group
    first = context.topology.rank == 0
    of_module = weights.to_save(module_state, shares, context.topology, _group(context))
    of_optimizer = stepped.Saved() if state is None else stepped.to_save(state, shares)
    rests = of_all_ranks(
        (of_module.rest, weights.described(shares), [*of_module.own], of_optimizer.rest),
        _group(context),
    )
    checksums: Checksums = {}

    def clear() -> None:
        if first:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

    def write_plain() -> None:
        own = {"state_dict": of_module.own, "optimizer": of_optimizer.own}
        if any(own.values()):
            _write(aside / _own_name(context), own, checksums)
        if first:
            _write(aside / COMMON, common, checksums)
            _write(aside / REST, _merged(rests, with_state=state is not None), checksums)

    def write_tensors() -> None:
        tensors = {**of_module.tensors, **of_optimizer.tensors}
        checksums.update(save_pieces(aside, tensors, _group(context)))

    def publish() -> None:
        of_ranks = of_all_ranks(checksums, group)
        if first:
            files = _union(of_ranks)
            known = {**sizes_of(context), **(settings or {}), FILES: files, MODEL: model}
            save_description(aside, known)
            sync_files(aside)
            put_in_place(aside, path)

    for step in (clear, write_plain, write_tensors, publish):
        _, failures = try_together(step, group)
        if failures:
            if first:
                shutil.rmtree(aside, ignore_errors=True)
            of_all_ranks(None, group)  # none may look before the folder is gone
            reasons = "; ".join(failure.text for failure in failures)
            kind = ValueError if all(failure.mistake for failure in failures) else WriteError
            raise kind(f"checkpoint {path} was not written: {reasons}")


def _group(context: ParallelContext) -> Any:
    """All ranks of the run, for values in host memory; None if this is the only one."""
    if context.topology.world_size == 1:
        return None
    return context.host_group or context.world_group


def _write(file: Path, value: Mapping[str, Any], checksums: Checksums) -> None:
    content.write(file, value)
    checksums[file.name] = checksum(file)


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


def aside_of(path: Path) -> Path:
    """Where a checkpoint is written to before it is whole.

    Its name tells nothing of the checkpoint's: a job that goes on under SLURM takes the highest
    number of all names with `hpc_ckpt_` in them, hidden ones as well.
    """
    return path.with_name(f".{hashlib.sha256(path.name.encode()).hexdigest()[:16]}.partial")


def load(
    path: Path,
    context: ParallelContext,
    shares: Shares,
    names: Collection[str],
    settings: Mapping[str, Any] | None = None,
    experts: Collection[str] = (),
) -> dict[str, Any]:
    """What was saved of this rank: `common`, with `state_dict`. Every rank must call this.

    With `settings`, those of this run, `optimizer_states` has what `load_state` reads.

    Args:
        path: of the folder, or of a file of Lightning's own.
        context: groups of this rank.
        shares: how this rank's parameters lie.
        names: of all in its module's state, among all.
        settings: what the optimizer was made with.
        experts: those of `names` that are an expert's.

    Raises:
        ValueError: on every rank, when one of them cannot read its files, or they do not fit.
    """
    of_run = {name for theirs in of_all_ranks([*names], context.world_group) for name in theirs}
    if path.is_file():
        elsewhere = of_run.difference(names)
        return together(
            lambda: from_file.load(path, shares, elsewhere, with_state=settings is not None),
            context.world_group,
        )

    def check() -> None:
        topology = read_topology(path)
        for file, (size, digest) in _share_of_work(topology.get(FILES, {}), context):
            check_file(path / file, size, digest)

    def read() -> dict[str, Any]:
        common = load_common(path)
        if read_topology(path).get("format", 1) == 1:
            common["state_dict"] = by_rank.load_weights(path, context, experts)
            if settings is not None:
                common["optimizer_states"] = [by_rank.load_state(path, context, settings)]
            return common
        if settings is not None:
            check_settings(path, {k: v for k, v in settings.items() if k != _SHARDED})
            common["optimizer_states"] = [{FROM: str(path)}]
        elsewhere = of_run.difference(names)
        common["state_dict"] = _load_weights(path, context, shares, elsewhere)
        return common

    together(check, context.world_group)
    return together(read, context.world_group)


def _share_of_work(files: Mapping[str, Any], context: ParallelContext) -> list[Any]:
    """The files that this rank checks, so that each is checked once."""
    topology = context.topology
    return sorted(files.items())[topology.rank :: topology.world_size]


def load_common(path: Path) -> dict[str, Any]:
    """What every rank has alike.

    Raises:
        ValueError: `path` is not a whole checkpoint of this format.
    """
    read_topology(path)
    return content.read(path / COMMON)


def _load_weights(
    path: Path, context: ParallelContext, shares: Shares, elsewhere: Collection[str]
) -> dict[str, Any]:
    """This rank's state of the module, and what no rank of the run has a place for."""
    metadata, rest = read_metadata(path), content.read(path / REST)
    tensors = metadata.state_dict_metadata
    saved = (n.removeprefix(weights.PREFIX) for n in tensors if n.startswith(weights.PREFIX))
    wanted = [name for name in saved if name not in elsewhere]
    if needed := [name for name in rest["alone"] if name not in elsewhere]:
        what = f"'{needed[0]}' is no parameter, and each of its ranks had another: "
        check_same(path, sizes_of(context), f"{what}{SAME}")
    state, pieces = weights.to_load(tensors, rest["shares"], shares, wanted, context.topology)
    load_pieces(path, metadata, pieces)
    plain = {name: value for name, value in rest["state_dict"].items() if name not in elsewhere}
    return {**state, **plain, **_own(path, context).get("state_dict", {})}


def load_state(
    state: Mapping[str, Any], context: ParallelContext, shares: Shares, form: Form
) -> dict[str, Any]:
    """The state of an optimizer of this rank, of what `load` has put into `optimizer_states`.

    Raises:
        ValueError: a file is missing or damaged, or something in it is for other sizes.
    """
    if FROM not in state:
        return dict(state)
    path = Path(state[FROM])
    if path.is_file():
        return from_file.load_state(path, context, shares, form)
    metadata, rest = read_metadata(path), content.read(path / REST)["optimizer"]
    if rest["alone"]:
        check_same(path, sizes_of(context), f"{rest['alone'][0]} cannot be cut, so {ALONE}")
    tensors, pieces = stepped.to_load(metadata.state_dict_metadata, shares, form)
    load_pieces(path, metadata, pieces)
    own = _own(path, context).get("optimizer", {})
    return stepped.of_rank(rest, tensors, own, shares, form)


def _own(path: Path, context: ParallelContext) -> dict[str, Any]:
    """What this rank has had alone, if it is the rank of a run of the same sizes."""
    file, topology = path / _own_name(context), read_topology(path)
    same = {name: topology.get(name) for name in sizes_of(context)} == sizes_of(context)
    return content.read(file) if same and file.name in topology[FILES] else {}


def _own_name(context: ParallelContext) -> str:
    return f"own-{context.topology.rank:05d}.pt"


def misfit(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str | None:
    """How weights of a checkpoint, by name, differ from those of this rank; None if they fit."""
    shapes, others = ({name: _shape(value) for name, value in w.items()} for w in (saved, own))
    different = [name for name in shapes if name in others and shapes[name] != others[name]]
    if different:
        name = different[0]
        found = f"has {name} of shape {shapes[name]}, this run of shape {others[name]}"
    elif different := [name for name in others if name not in shapes]:
        found = f"does not have {different[0]}, this run does"
    elif different := [name for name in shapes if name not in others]:
        found = f"has {different[0]}, this run does not"
    else:
        return None
    more = f", and {len(different) - 1} more like it" if len(different) > 1 else ""
    return (
        f"the checkpoint {found}{more}: give the model the sizes that it was saved with, or use"
        " another checkpoint"
    )


def _shape(value: Any) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None
