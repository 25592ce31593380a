"""Checkpoints as version 0.1 wrote them: a file per rank."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.checkpoint import content
from lightning_dhellam.checkpoint.description import FILES, read_topology, sizes_of
from lightning_dhellam.checkpoint.pieces import Pieces
from lightning_dhellam.checkpoint.reading import load_pieces, read_metadata
from lightning_dhellam.checkpoint.stepped import values_of
from lightning_dhellam.parallel import ParallelContext


def whole_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint of today, as one process sees it."""
    metadata = read_metadata(path)
    found, pieces = {}, {}
    for name, saved in metadata.state_dict_metadata.items():
        found[name] = torch.full(saved.size, -1, dtype=saved.properties.dtype)
        start = (0,) * found[name].dim()
        pieces[name] = Pieces(saved.size, found[name].dtype, [(start, found[name])])
    load_pieces(path, metadata, pieces)
    return found


def make_old(path: Path) -> None:
    """Make a checkpoint that one process has written today one of the first format."""
    rest, weights = content.read(path / "rest.pt"), {}
    saved = rest["optimizer"]
    state = {"state": values_of(saved), "master_weights": {}, "parts": {}, "other": {}}
    for place, tensor in whole_tensors(path).items():
        kind, _, name = place.partition("/")
        if kind == "weights":
            weights[name] = tensor
            continue
        key, _, name = name.partition("/")
        if key == "master_weight":
            state["master_weights"][name] = tensor
        else:
            state["state"][name] = {**state["state"][name], key: tensor}
    content.write(path / "weights-00000.pt", {**weights, **rest["state_dict"]})
    content.write(path / "state-00000.pt", {**state, "groups": saved["groups"]})
    topology = {**read_topology(path), "format": 1}
    for name in ("checksum", FILES):
        del topology[name]
    (path / "topology.json").write_text(json.dumps(topology))
    for file in (*path.glob("*.distcp"), path / ".metadata", path / "rest.pt"):
        file.unlink()


def save(
    path: Path,
    context: ParallelContext,
    weights: Mapping[str, Any],
    experts: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> None:
    """Write this rank's files of the first format, without a state. Every rank must call this."""
    topology = context.topology
    path.mkdir(exist_ok=True)
    if topology.replica == 0:
        number = topology.tp_rank + topology.pp_rank * topology.tp_size
        content.write(path / f"weights-{number:05d}.pt", weights)
    if topology.expert_dp_rank == 0:
        place = topology.ep_rank + topology.ep_size * topology.pp_rank
        number = topology.etp_rank + topology.etp_size * place
        content.write(path / f"experts-{number:05d}.pt", experts)
    content.write(path / f"state-{topology.rank:05d}.pt", {})
    if topology.rank == 0:
        content.write(path / "common.pt", {})
        fields = {"format": 1, **sizes_of(context), **settings, "model": None}
        (path / "topology.json").write_text(json.dumps(fields))
