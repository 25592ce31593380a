"""A checkpoint of a model-parallel run: a folder with one file per rank.

    epoch=0-step=100.ckpt/
        topology.json    sizes and settings of the run that wrote it, and its model
        common.pt        what every rank has alike: loops, callbacks, schedulers, hyperparameters
        weights-00001.pt of model-parallel rank 1
        experts-00002.pt experts that rank 2 of tensor, expert and pipeline parallelism holds, by
                         their numbers among all
        state-00003.pt   optimizer state of rank 3

Written aside and renamed when every rank is done, so that a folder of the final name is whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_dhellam.checkpoint import content
from lightning_dhellam.files import WriteError, put_in_place, read_json, save_text, sync_files
from lightning_dhellam.parallel.collectives import of_all_ranks, together, try_together
from lightning_dhellam.parallel.context import ParallelContext

TOPOLOGY = "topology.json"
COMMON = "common.pt"
MODEL = "model"
"""Where the topology has the description of the model."""
_FORMAT = 1
_OF_REPLICAS = ("context_parallel_size", "data_parallel_size", "expert_parallel_size")
"""Sizes that weights do not depend on."""
_SAME = "use the same value"
_ALONE = (
    f"{_SAME} to go on training; or train anew from its weights alone, by"
    " trainer.validate(module, data, ckpt_path=…) and then trainer.fit(module, data), or by"
    " Runner.load before Runner.optimizer"
)
"""What to do where the weights fit, and the optimizer's state does not."""


def save(
    path: Path,
    context: ParallelContext,
    common: Mapping[str, Any],
    weights: Mapping[str, Any],
    state: Mapping[str, Any] | None,
    settings: Mapping[str, Any] | None = None,
    model: Mapping[str, Any] | None = None,
    experts: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint. Every rank must call this, with the same path on a shared file system.

    Args:
        path: of the folder.
        context: groups of this rank.
        common: what every rank has alike.
        weights: this model-parallel rank's.
        state: this rank's, of the optimizer.
        settings: what decides the form of `state`, by the names that the user knows.
        model: what the weights are of.
        experts: weights of this rank's experts, by their names among all.

    Raises:
        WriteError: a rank could not write; on every rank, and `path` is as it was before.
        ValueError: the same, because something cannot be saved so that it could be read again.
    """
    aside = aside_of(path)

    def clear() -> None:
        if context.topology.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

    def write() -> None:
        if context.topology.replica == 0:
            content.write(aside / _weights_name(context), weights)
        if experts and context.topology.expert_dp_rank == 0:
            content.write(aside / _experts_name(context, context.topology.ep_rank), experts)
        if state is not None:
            content.write(aside / _state_name(context), state)
        if context.topology.rank == 0:
            content.write(aside / COMMON, common)
            topology = {**_topology(context), **(settings or {}), MODEL: model}
            save_text(aside / TOPOLOGY, json.dumps(topology, indent=2) + "\n")

    def publish() -> None:
        if context.topology.rank == 0:
            sync_files(aside)
            put_in_place(aside, path)

    for step in (clear, write, publish):
        _, failures = try_together(step, context.world_group)
        if failures:
            if context.topology.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            of_all_ranks(None, context.world_group)  # none may look before the folder is gone
            reasons = "; ".join(failure.text for failure in failures)
            kind = ValueError if all(failure.mistake for failure in failures) else WriteError
            raise kind(f"checkpoint {path} was not written: {reasons}")


def aside_of(path: Path) -> Path:
    """Where a checkpoint is written to before it is whole.

    Its name tells nothing of the checkpoint's: a job that goes on under SLURM takes the highest
    number of all names with `hpc_ckpt_` in them, hidden ones as well.
    """
    return path.with_name(f".{hashlib.sha256(path.name.encode()).hexdigest()[:16]}.partial")


def load(
    path: Path,
    context: ParallelContext,
    settings: Mapping[str, Any] | None = None,
    experts: Collection[str] = (),
) -> dict[str, Any]:
    """What was saved of this rank: `common`, with `state_dict`. Every rank must call this.

    With `settings`, those of this run, `optimizer_states` holds this rank's as well. `experts` are
    the names, among all, of this rank's experts.

    Raises:
        ValueError: on every rank, when one of them cannot read its files, or they do not fit.
    """

    def read() -> dict[str, Any]:
        common = load_common(path)
        common["state_dict"] = load_weights(path, context, experts)
        if settings is not None:
            common["optimizer_states"] = [load_state(path, context, settings)]
        return common

    return together(read, context.world_group)


def load_common(path: Path) -> dict[str, Any]:
    """What every rank has alike.

    Raises:
        ValueError: `path` is not a whole checkpoint of this format.
    """
    read_topology(path)
    return content.read(path / COMMON)


def load_weights(
    path: Path, context: ParallelContext, experts: Collection[str] = ()
) -> dict[str, Any]:
    """This model-parallel rank's weights, and those of its `experts`, by their names among all.

    Data, context and expert-parallel sizes may have changed.

    Raises:
        ValueError: the checkpoint was written with other model-parallel sizes, or is damaged.
    """
    mine = _topology(context)
    for name in _OF_REPLICAS:
        del mine[name]
    _check(path, mine)
    weights = content.read(path / _weights_name(context))
    return weights | _load_experts(path, context, frozenset(experts)) if experts else weights


def _load_experts(path: Path, context: ParallelContext, names: frozenset[str]) -> dict[str, Any]:
    topology, parts = context.topology, int(read_topology(path).get("expert_parallel_size", 1))
    if parts == topology.ep_size:
        return content.read(path / _experts_name(context, topology.ep_rank))
    found: dict[str, Any] = {}
    # The ranks' experts are in the order of their numbers.
    first = topology.ep_rank * parts // topology.ep_size
    for part in (*range(first, parts), *range(first)):
        if names <= found.keys():
            break
        saved = content.read(path / _experts_name(context, part, parts))
        found |= {name: value for name, value in saved.items() if name in names}
    return found


def load_state(path: Path, context: ParallelContext, settings: Mapping[str, Any]) -> dict[str, Any]:
    """This rank's optimizer state, for a run with `settings`.

    Raises:
        ValueError: the checkpoint was written with other sizes or settings, or without optimizer
            state, or is damaged.
    """
    _check(path, _topology(context), _ALONE)
    if not set(settings) & set(read_topology(path)):
        raise ValueError(
            f"checkpoint {path} holds weights only: training cannot go on from it; start a new run"
            " from these weights, or save with save_weights_only=False"
        )
    _check(path, settings, _ALONE)
    return content.read(path / _state_name(context))


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


def read_topology(path: Path) -> dict[str, Any]:
    """Sizes and settings of the run that wrote a checkpoint.

    Raises:
        ValueError: `path` is not a checkpoint, or is damaged.
    """
    file = path / TOPOLOGY
    if not file.is_file():
        kind = f"has no {TOPOLOGY}" if path.is_dir() else "is not a folder"
        raise ValueError(
            f"checkpoint {path} {kind if path.exists() else 'does not exist'}: give a folder that"
            " a run with DHellamStrategy wrote"
        )
    return read_json(file, "description of a checkpoint", content.REMEDY)


def _topology(context: ParallelContext) -> dict[str, Any]:
    topology = context.topology
    return {
        "format": _FORMAT,
        "tensor_parallel_size": topology.tp_size,
        "pipeline_parallel_size": topology.pp_size,
        "pipeline_split": list(context.pipeline_split) if topology.pp_size > 1 else None,
        "context_parallel_size": topology.cp_size,
        "data_parallel_size": topology.dp_size,
        "expert_parallel_size": topology.ep_size,
        "expert_tensor_parallel_size": topology.etp_size,
    }


def _check(path: Path, mine: Mapping[str, Any], remedy: str = _SAME) -> None:
    # Older checkpoints do not name what every run had then.
    saved = read_topology(path)
    whole = {"context_parallel_size": 1, "expert_parallel_size": 1}
    whole["expert_tensor_parallel_size"] = saved.get("tensor_parallel_size", 1)
    saved = {**whole, **saved}
    for name in mine:
        if saved.get(name) != mine[name]:
            raise ValueError(
                f"checkpoint {path} was written with {name}={saved.get(name)}, this run has"
                f" {name}={mine[name]}: {remedy}"
            )


def _weights_name(context: ParallelContext) -> str:
    topology = context.topology
    return f"weights-{topology.tp_rank + topology.pp_rank * topology.tp_size:05d}.pt"


def _experts_name(context: ParallelContext, part: int, parts: int | None = None) -> str:
    """The file of one of the `parts` of the experts; of this run's number of parts if not given."""
    topology = context.topology
    place = part + (parts or topology.ep_size) * topology.pp_rank
    return f"experts-{topology.etp_rank + topology.etp_size * place:05d}.pt"


def _state_name(context: ParallelContext) -> str:
    return f"state-{context.topology.rank:05d}.pt"
