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
Written aside and renamed when every rank is done, so that a folder of the final name is whole; see
`writing`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from itertools import chain
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from lightning_dhellam.checkpoint import by_rank, content, from_file, stepped, weights
from lightning_dhellam.checkpoint.checksums import Part, compare, sum_share
from lightning_dhellam.checkpoint.content import REMEDY
from lightning_dhellam.checkpoint.description import (
    ALONE,
    FILES,
    FROM,
    SAME,
    TOPOLOGY,
    check_same,
    check_settings,
    contents_of,
    inside_of,
    is_of_sizes,
    read_topology,
    sizes_of,
)
from lightning_dhellam.checkpoint.reading import load_pieces, read_metadata
from lightning_dhellam.checkpoint.shares import Shares
from lightning_dhellam.parallel.collectives import of_all_ranks, together, values_or_error
from lightning_dhellam.parallel.context import ParallelContext
from lightning_dhellam.parallel.optimizer_state import Form
from lightning_dhellam.remote import Folder, place_of

COMMON = "common.pt"
REST = "rest.pt"
_METADATA, _REST, _OWN = "metadata", "rest", "own"
"""Where a state of an optimizer that is yet to be read has what is known of it."""
_SHARDED = "distributed_optimizer"
"""What decides who has what of a state, and nothing else."""


def load(
    path: Folder,
    context: ParallelContext,
    shares: Shares,
    names: Collection[str],
    settings: Mapping[str, Any] | None = None,
    experts: Collection[str] = (),
    *,
    checked: bool = False,
    check: Callable[[Mapping[str, Any]], None] | None = None,
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
        checked: whether all ranks know that it is whole, by `check_whole`.
        check: raises what this rank has against what it has read, for all ranks.

    Raises:
        ValueError: on every rank, when one of them cannot read its files, or they do not fit.
    """
    own = [*names]
    if checked or path.is_file():
        of_ranks, fault = of_all_ranks(own, context.world_group), None
    else:
        of_ranks, fault = _examined(path, context, own)
    if fault is not None:
        raise fault
    elsewhere = {name for theirs in of_ranks for name in theirs}.difference(own)

    def read() -> dict[str, Any]:
        if path.is_file():
            return from_file.load(path, shares, elsewhere, with_state=settings is not None)
        known = read_topology(path)
        inside = inside_of(path, known)
        common = content.read(inside / COMMON)
        if known.get("format", 1) == 1:
            common["state_dict"] = by_rank.load_weights(path, context, experts)
            if settings is not None:
                common["optimizer_states"] = [by_rank.load_state(path, context, settings)]
            return common
        metadata, rest = read_metadata(inside), content.read(inside / REST)
        own = _own(path, known, context)
        if settings is not None:
            check_settings(path, {k: v for k, v in settings.items() if k != _SHARDED})
            kept = {_METADATA: metadata, _REST: rest["optimizer"], _OWN: own.get("optimizer", {})}
            common["optimizer_states"] = [{FROM: str(path), **kept}]
        state = _load_weights(path, context, shares, elsewhere, metadata, rest)
        common["state_dict"] = {**state, **own.get("state_dict", {})}
        return common

    def read_checked() -> dict[str, Any]:
        found = read()
        if check is not None:
            check(found)
        return found

    return together(read_checked, context.world_group)


def check_whole(path: Folder, context: ParallelContext) -> None:
    """Refuse a checkpoint of which a file is not as it was written. Every rank must call this.

    Each byte is read by one rank. Of a file of Lightning's own nothing is known.

    Raises:
        ValueError: on every rank: a file is missing or damaged, or there is no checkpoint.
    """
    fault = fault_of(path, context)
    if fault is not None:
        raise fault


def fault_of(path: Folder, context: ParallelContext) -> Exception | None:
    """What `check_whole` refuses a checkpoint for: on every rank, or on none.

    Every rank must call this. What it raises is no fault of the checkpoint: ranks have lost each
    other, or were told to end.
    """
    return _examined(path, context, None)[1]


def _examined(
    path: Folder, context: ParallelContext, told: Any
) -> tuple[list[Any], Exception | None]:
    """What all ranks have `told`, and what `fault_of` a checkpoint is."""
    group = context.world_group
    # Those that read: of an emulated cluster there is one, whatever its topology says.
    rank, ranks = (0, 1) if group is None else (group.rank(), group.size())
    files: dict[str, Any] = {}

    def add_up() -> tuple[Any, str, list[Part]]:
        files.update({} if path.is_file() else read_topology(path).get(FILES, {}))
        known = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
        return told, known, sum_share(path, files, rank, ranks)

    found, error = values_or_error(add_up, group)
    if isinstance(error, SystemExit):
        raise error
    if error is not None:
        return [], error
    of_ranks, descriptions, parts = zip(*found, strict=True)
    for other, description in enumerate(descriptions):
        if description != descriptions[0]:  # it was replaced, or a file system shows an older one
            return [], ValueError(
                f"checkpoint {path} is not the same for all ranks: rank {other} has read another"
                f" {TOPOLOGY} than rank 0: {REMEDY}"
            )
    try:
        compare(path, files, chain.from_iterable(parts))
    except ValueError as damage:
        return [], damage
    return [*of_ranks], None


def load_common(path: Folder) -> dict[str, Any]:
    """What every rank has alike.

    Raises:
        ValueError: `path` is not a whole checkpoint of this format.
    """
    return content.read(contents_of(path) / COMMON)


def _load_weights(
    path: Folder,
    context: ParallelContext,
    shares: Shares,
    elsewhere: Collection[str],
    metadata: Metadata,
    rest: Mapping[str, Any],
) -> dict[str, Any]:
    """This rank's state of the module, and what no rank of the run has a place for."""
    tensors = metadata.state_dict_metadata
    saved = (n.removeprefix(weights.PREFIX) for n in tensors if n.startswith(weights.PREFIX))
    wanted = [name for name in saved if name not in elsewhere]
    if needed := [name for name in rest["alone"] if name not in elsewhere]:
        what = f"'{needed[0]}' is no parameter, and each of its ranks had another: "
        check_same(path, sizes_of(context), f"{what}{SAME}")
    state, pieces = weights.to_load(tensors, rest["shares"], shares, wanted, context.topology)
    load_pieces(contents_of(path), metadata, pieces)
    plain = {name: value for name, value in rest["state_dict"].items() if name not in elsewhere}
    return {**state, **plain}


def load_state(
    state: Mapping[str, Any], context: ParallelContext, shares: Shares, form: Form
) -> dict[str, Any]:
    """The state of an optimizer of this rank, of what `load` has put into `optimizer_states`.

    Raises:
        ValueError: a file is missing or damaged, or something in it is for other sizes.
    """
    if FROM not in state:
        return dict(state)
    path = place_of(state[FROM])
    if path.is_file():
        return from_file.load_state(path, context, shares, form)
    metadata, rest = state[_METADATA], state[_REST]
    if rest["alone"]:
        check_same(path, sizes_of(context), f"{rest['alone'][0]} cannot be cut, so {ALONE}")
    tensors, pieces = stepped.to_load(metadata.state_dict_metadata, shares, form)
    load_pieces(contents_of(path), metadata, pieces)
    return stepped.of_rank(rest, tensors, state[_OWN], shares, form)


def _own(path: Folder, known: Mapping[str, Any], context: ParallelContext) -> dict[str, Any]:
    """What this rank has had alone, if it is the rank of a run of the same sizes."""
    file = inside_of(path, known) / own_name(context)
    names = {name.rpartition("/")[2] for name in known[FILES]}
    same = file.name in names and is_of_sizes(known, context)
    return content.read(file) if same else {}


def own_name(context: ParallelContext) -> str:
    """The file of what only this rank has."""
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
