"""What a module's state is made of as all ranks have it together, and what one rank takes of it.

Parameters are cut as `shares` says. All else in a state, such as buffers, is whole, and the same on
all ranks that have it: what is not is for the same sizes only.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_dhellam.checkpoint.pieces import Pieces, empty_place
from lightning_dhellam.checkpoint.shares import Share, Shares
from lightning_dhellam.parallel.collectives import of_all_ranks
from lightning_dhellam.parallel.topology import Topology

PREFIX = "weights/"


@dataclass
class Saved:
    """What a rank saves of a module's state.

    Attributes:
        tensors: parameters, and what is whole.
        rest: what is no tensor.
        own: tensors that only this rank has so.
    """

    tensors: dict[str, Pieces] = field(default_factory=dict)
    rest: dict[str, Any] = field(default_factory=dict)
    own: dict[str, Tensor] = field(default_factory=dict)


def to_save(
    state: Mapping[str, Any], shares: Shares, topology: Topology, group: ProcessGroup | None
) -> Saved:
    """What a rank saves of a state, by names among all. Every rank of `group` must call this."""
    saved, whole = Saved(), {}
    for name, value in state.items():
        share = shares.get(name)
        if not isinstance(value, Tensor):
            saved.rest[name] = value
        elif share is None or tuple(value.shape) != share.local:
            whole[name] = value
        elif share.counts:
            saved.tensors[PREFIX + name] = Pieces(share.shape, value.dtype, share.pieces(value))
    for name, alike in _alike(whole, topology, group).items():
        if not alike:
            saved.own[name] = whole[name]
        else:
            start = (0,) * whole[name].dim()
            pieces = Pieces(whole[name].shape, whole[name].dtype, [(start, whole[name])])
            saved.tensors[PREFIX + name] = pieces
    return saved


def _alike(
    whole: Mapping[str, Tensor], topology: Topology, group: ProcessGroup | None
) -> dict[str, bool]:
    """Whether tensor-parallel ranks have the same of what this rank is to save whole, by name.

    What is the same is saved by the first rank that has it, and is left out on all others.
    """
    # A rank without others to compare with waits for no device.
    several = topology.tp_size > 1
    mine = {name: _sum(tensor) if several else "" for name, tensor in whole.items()}
    firsts: dict[str, int] = {}
    of_tp: dict[str, dict[int, str]] = {}
    for rank, (tp_rank, theirs) in enumerate(of_all_ranks((topology.tp_rank, mine), group)):
        for name, found in theirs.items():
            firsts.setdefault(name, rank)
            of_tp.setdefault(name, {}).setdefault(tp_rank, found)
    alike = {name: len({*of_tp[name].values()}) == 1 for name in mine}
    return {name: a for name, a in alike.items() if not a or firsts[name] == topology.rank}


def _sum(tensor: Tensor) -> str:
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{tuple(tensor.shape)} {tensor.dtype} {zlib.crc32(plain.numpy().tobytes()):08x}"


def described(shares: Shares) -> dict[str, list[Any]]:
    """How parameters lie, whatever the sizes: by name the axis, the strips and whose it is."""
    return {name: [share.axis, share.strips, share.of_expert] for name, share in shares.items()}


def to_load(
    metadata: Mapping[str, Any],
    lying: Mapping[str, list[Any]],
    shares: Shares,
    wanted: Collection[str],
    topology: Topology,
) -> tuple[dict[str, Tensor], dict[str, Pieces]]:
    """Where to read a rank's state: by name among all tensors, and their pieces.

    Args:
        metadata: of the tensors that were saved.
        lying: how parameters lay, as `described`.
        shares: of this rank's parameters.
        wanted: names of what to read.
        topology: of this run.
    """
    state: dict[str, Tensor] = {}
    pieces: dict[str, Pieces] = {}
    for name in wanted:
        saved = metadata[PREFIX + name]
        assert isinstance(saved, TensorStorageMetadata)
        share = shares.get(name)
        rows = saved.size[0] if share is not None and share.rows is not None else None
        if share is None or not share.fits(tuple(saved.size)):
            share, rows = _as_it_lay(tuple(saved.size), lying.get(name), topology), None
        state[name] = empty_place(share.local, saved.properties.dtype)
        found = share.pieces(state[name], saved_rows=rows)
        pieces[PREFIX + name] = Pieces(saved.size, saved.properties.dtype, found)
    return state, pieces


def _as_it_lay(shape: tuple[int, ...], lay: list[Any] | None, topology: Topology) -> Share:
    """The share of what this run has no place for, which a hook may know what to do with."""
    axis, strips, of_expert = lay or (None, 1, False)
    sizes = (topology.etp_rank, topology.etp_size) if of_expert else ()
    place, places = sizes or (topology.tp_rank, topology.tp_size)
    if axis is None or shape[axis] % (strips * places):
        return Share(shape)
    return Share(shape, axis, strips, place, places)
