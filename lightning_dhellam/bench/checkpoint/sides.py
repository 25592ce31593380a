"""Three ways to write and read what one rank of a run holds."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import checkpoint as dcp

from lightning_dhellam.checkpoint import content, shares_of, stepped, weights
from lightning_dhellam.checkpoint.loop import WEIGHTS
from lightning_dhellam.checkpoint.pieces import Pieces
from lightning_dhellam.files import put_in_place, sync_files
from lightning_dhellam.parallel.optimizer import ModelParallelOptimizer
from lightning_dhellam.runner import Runner

Parts = Mapping[str, Tensor]
"""The parts of tensors that a rank has, by names that no other part has."""


class Side(Protocol):
    """A way to save and load, which every rank calls with the same path."""

    def save(self, path: Path) -> None:
        """Write everything, so that a power cut loses nothing."""

    def load(self, path: Path) -> Callable[[], Parts]:
        """Read everything. Returns what tells what it has read."""


class Checkpoint:
    """Checkpoints as a run has them: global tensors, checksums, written aside and renamed."""

    def __init__(self, runner: Runner, optimizer: ModelParallelOptimizer) -> None:
        self.runner, self.optimizer = runner, optimizer

    def save(self, path: Path) -> None:
        """What the ranks of a run call."""
        self.runner.save(path)

    def load(self, path: Path) -> Callable[[], Parts]:
        """The same, which compares checksums."""
        self.runner.load(path)
        return lambda: parts_of(self.runner, self.optimizer)


class PlainDCP:
    """Torch's distributed checkpoint of the same parts of tensors, each under a name of its own.

    Weights are read into the model; the optimizer's state into new memory, since an optimizer that
    has made no step has none.
    """

    def __init__(self, runner: Runner, optimizer: ModelParallelOptimizer) -> None:
        self.tensors = parts_of(runner, optimizer)

    def save(self, path: Path) -> None:
        """Torch brings each file to the disk."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(dict(self.tensors), checkpoint_id=path)

    def load(self, path: Path) -> Callable[[], Parts]:
        """Torch reads it, without any checksum."""
        tensors = {
            name: torch.empty_like(tensor) if name.startswith(stepped.PREFIX) else tensor
            for name, tensor in self.tensors.items()
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(tensors, checkpoint_id=path)
        return lambda: tensors


class FilePerRank:
    """What version 0.1 wrote: weights by one replica, each rank's state, by `torch.save`."""

    def __init__(self, runner: Runner, optimizer: ModelParallelOptimizer) -> None:
        self.runner, self.optimizer = runner, optimizer
        topology = runner.context.topology
        place = topology.tp_rank + topology.pp_rank * topology.tp_size
        self.weights = f"weights-{place:05d}.pt"
        self.writes_weights = topology.replica == 0
        self.rank = topology.rank

    def save(self, path: Path) -> None:
        """Files aside, brought to the disk by the first rank, which renames their folder."""
        aside = path.with_name(f".{path.name}.partial")
        if self.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        dist.barrier()
        if self.writes_weights:
            content.write(aside / self.weights, self.runner.model.state_dict())
        content.write(aside / f"state-{self.rank:05d}.pt", self.optimizer.state_dict())
        dist.barrier()
        if self.rank == 0:
            sync_files(aside)
            put_in_place(aside, path)

    def load(self, path: Path) -> Callable[[], Parts]:
        """This rank's files, into the model and the optimizer."""
        self.runner.model.load_state_dict(content.read(path / self.weights))
        self.optimizer.load_state_dict(content.read(path / f"state-{self.rank:05d}.pt"))
        return lambda: parts_of(self.runner, self.optimizer)


SIDES: Mapping[str, Callable[[Runner, ModelParallelOptimizer], Side]] = {
    "checkpoint": Checkpoint,
    "plain DCP": PlainDCP,
    "file per rank": FilePerRank,
}


def parts_of(runner: Runner, optimizer: ModelParallelOptimizer) -> Parts:
    """The parts of tensors that this rank saves in a checkpoint."""
    context, model = runner.context, runner.model
    shares = {WEIGHTS + n: share for n, share in shares_of(model, context.topology).items()}
    state = {WEIGHTS + n: value for n, value in model.state_dict().items()}
    group = context.host_group or context.world_group
    of_module = weights.to_save(state, shares, context.topology, group)
    of_optimizer = stepped.to_save(optimizer.state_dict(), shares)
    both: Any = chain(of_module.tensors.items(), of_optimizer.tensors.items())
    return {
        f"{name}/{context.topology.rank}/{number}": piece
        for name, pieces in both
        for number, piece in enumerate(_tensors(pieces))
    }


def _tensors(pieces: Pieces) -> list[Tensor]:
    return list(pieces.pieces.values())
