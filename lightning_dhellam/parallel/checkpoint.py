"""A checkpoint of a model-parallel run: a folder with one file per rank.

    epoch=0-step=100.ckpt/
        topology.json    sizes and settings of the run that wrote it
        common.pt        what every rank has alike: loops, callbacks, schedulers, hyperparameters
        weights-00001.pt of model-parallel rank 1
        state-00003.pt   optimizer state of rank 3

Written aside and renamed when every rank is done, so that a folder of the final name is whole.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_dhellam.parallel.context import ParallelContext
from lightning_dhellam.staging import put_in_place, sync_files

TOPOLOGY = "topology.json"
COMMON = "common.pt"
_FORMAT = 1


def save(
    path: Path,
    context: ParallelContext,
    common: Mapping[str, Any],
    weights: Mapping[str, Any],
    state: Mapping[str, Any] | None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint. Every rank must call this, with the same path on a shared file system.

    `settings` are what decides the form of `state`, by the names that the user knows.

    Raises:
        OSError: a rank could not write; on every rank, and `path` is as it was before.
    """
    aside = path.with_name(f".{path.name}.partial")

    def clear() -> None:
        if context.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)

    def write() -> None:
        if context.dp_rank == 0:
            torch.save(dict(weights), aside / _weights_name(context))
        if state is not None:
            torch.save(dict(state), aside / f"state-{context.rank:05d}.pt")
        if context.rank == 0:
            torch.save(dict(common), aside / COMMON)
            topology = {**_topology(context), **(settings or {})}
            (aside / TOPOLOGY).write_text(json.dumps(topology, indent=2) + "\n")

    def publish() -> None:
        if context.rank == 0:
            sync_files(aside)
            put_in_place(aside, path)

    for step in (clear, write, publish):
        failures = _try_together(step, context)
        if failures:
            if context.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            _all_ranks("")  # no rank may look before the folder is gone
            raise OSError(f"checkpoint {path} was not written: {'; '.join(failures)}")


def load_common(path: Path) -> dict[str, Any]:
    """What every rank has alike.

    Raises:
        ValueError: `path` is not a whole checkpoint of this format.
    """
    _read_topology(path)
    common: dict[str, Any] = torch.load(path / COMMON, map_location="cpu", weights_only=False)
    return common


def load_weights(path: Path, context: ParallelContext) -> dict[str, Any]:
    """This model-parallel rank's weights. The data-parallel size may have changed.

    Raises:
        ValueError: the checkpoint was written with other model-parallel sizes.
    """
    mine = _topology(context)
    del mine["data_parallel_size"]
    _check(path, mine)
    weights: dict[str, Any] = torch.load(
        path / _weights_name(context), map_location="cpu", weights_only=True
    )
    return weights


def load_state(path: Path, context: ParallelContext, settings: Mapping[str, Any]) -> dict[str, Any]:
    """This rank's optimizer state, for a run with `settings`.

    Raises:
        ValueError: the checkpoint was written with other sizes or settings, or without optimizer
            state.
    """
    file = path / f"state-{context.rank:05d}.pt"
    if not file.is_file():
        raise ValueError(
            f"checkpoint {path} holds weights only: training cannot go on from it; start a new run"
            " from these weights, or save with save_weights_only=False"
        )
    _check(path, {**_topology(context), **settings})
    state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=False)
    return state


def _topology(context: ParallelContext) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "tensor_parallel_size": context.tp_size,
        "pipeline_parallel_size": context.pp_size,
        "pipeline_split": list(context.pipeline_split) if context.pp_size > 1 else None,
        "data_parallel_size": context.dp_size,
    }


def _read_topology(path: Path) -> dict[str, Any]:
    if not (path / TOPOLOGY).is_file():
        kind = "is not a folder" if not path.is_dir() else f"has no {TOPOLOGY}"
        raise ValueError(
            f"checkpoint {path} {kind}: give a folder that a run with DHellamStrategy wrote"
        )
    topology: dict[str, Any] = json.loads((path / TOPOLOGY).read_text())
    return topology


def _check(path: Path, mine: Mapping[str, Any]) -> None:
    saved = _read_topology(path)
    for name in mine:
        if saved.get(name) != mine[name]:
            raise ValueError(
                f"checkpoint {path} was written with {name}={saved.get(name)}, this run has"
                f" {name}={mine[name]}: use the same value"
            )


def _weights_name(context: ParallelContext) -> str:
    return f"weights-{context.tp_rank + context.pp_rank * context.tp_size:05d}.pt"


def _try_together(step: Callable[[], None], context: ParallelContext) -> list[str]:
    """Run `step` on every rank, and wait for all of them. Returns what went wrong, on every rank.

    A rank that raised at once would leave the others waiting for it.
    """
    failure = ""
    try:
        step()
    except Exception as error:
        failure = f"rank {context.rank}: {type(error).__name__}: {error}"
    return [text for text in _all_ranks(failure) if text]


def _all_ranks(text: str) -> list[str]:
    if not dist.is_initialized():
        return [text]
    texts = [""] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return texts
