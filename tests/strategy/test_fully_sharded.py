"""A checkpoint of ours goes on where weights and state are sharded by `fully_shard`, on CPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_dhellam.commands.main import main
from tests.ranks import run_ranks
from tests.strategy.runs import Losses, Model, join, loader, make_trainer

WORLD, STOP, STEPS = 2, 2, 5
OURS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_parallel_size": 2},
    "pp2": {"pipeline_parallel_size": 2},
    "dp2": {"distributed_optimizer": True},
}


class Sharded(Model):
    """Each layer, and what is around them, lies on all ranks in parts."""

    def configure_model(self) -> None:
        super().configure_model()
        mesh = self.device_mesh["data_parallel"]
        for layer in self.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self.model, mesh=mesh)


class Start(NamedTuple):
    """What a run goes on from.

    Attributes:
        parts: parameters of which a rank has a part.
        weights: whole, by name.
        state: of the optimizer, whole, by name and kind.
    """

    parts: int
    weights: dict[str, Tensor]
    state: dict[str, dict[str, Tensor]]


class Begin(Callback):
    """Notes what a run goes on from."""

    start: Start

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        named = dict(module.named_parameters())
        kept = trainer.optimizers[0].state
        self.start = Start(
            sum(isinstance(parameter, DTensor) for parameter in named.values()),
            {name: _whole(parameter) for name, parameter in named.items()},
            {
                name: {kind: _whole(value) for kind, value in kept[parameter].items()}
                for name, parameter in named.items()
            },
        )


Outcome = tuple[list[float], Start]
"""Losses of the steps of a run, and what it began with."""


def _whole(value: Tensor) -> Tensor:
    value = value.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).clone()


def _sharded() -> ModelParallelStrategy:
    return ModelParallelStrategy(
        data_parallel_size=WORLD, tensor_parallel_size=1, save_distributed_checkpoint=False
    )


def _go_on(strategy: Any, module: Model, path: Path, save: Path | None = None) -> Outcome:
    losses, begin = Losses(), Begin()
    trainer = make_trainer(strategy, [losses, begin], max_steps=STEPS)
    trainer.fit(module, loader({}), ckpt_path=path)
    if save is not None:
        trainer.save_checkpoint(save)
    return losses.values, begin.start


def _on_rank(rank: int, root: Path) -> tuple[dict[str, Outcome], dict[str, list[float]]]:
    join(rank, WORLD)
    found = {}
    for name, sizes in OURS.items():
        trainer = make_trainer(sizes, max_steps=STOP)
        trainer.fit(Model(), loader(sizes))
        trainer.save_checkpoint(root / f"{name}.ckpt")
        whole = root / f"{name}.file"
        if rank == 0:
            words = ["convert", f"{root}/{name}.ckpt", str(whole), "--to=lightning"]
            assert main(words) == 0
        torch.distributed.barrier()
        found[f"{name} sharded"] = _go_on(_sharded(), Sharded(), whole, root / f"{name}.back")
        found[f"{name} ddp"] = _go_on("ddp", Model(), whole)
    back = {name: _at(sizes, root / f"{name}.back") for name, sizes in OURS.items()}
    return found, back


def _at(sizes: dict[str, Any], path: Path) -> list[float]:
    losses = Losses()
    trainer = make_trainer(sizes, [losses], max_steps=STEPS + 1)
    trainer.fit(Model(), loader(sizes), ckpt_path=path)
    return losses.values


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, Outcome], dict[str, list[float]]]:
    return run_ranks(WORLD, _on_rank, tmp_path_factory.mktemp("sharded"))[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", OURS)
def test_a_whole_file_goes_on_in_shards(found: Any, name: str) -> None:
    outcomes, _ = found
    (theirs, sharded), (plain, whole) = outcomes[f"{name} sharded"], outcomes[f"{name} ddp"]
    assert sharded.parts == len(sharded.weights) > 10 and whole.parts == 0
    assert sharded.weights.keys() == whole.weights.keys()
    for key, value in whole.weights.items():
        assert torch.equal(sharded.weights[key], value), key
        assert sharded.state[key].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for kind, of_whole in whole.state[key].items():
            assert of_whole.abs().sum() > 0 and torch.equal(sharded.state[key][kind], of_whole)
    assert len(set(theirs)) == STEPS - STOP and theirs == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("name", OURS)
def test_what_shards_have_saved_goes_on_here(found: Any, name: str) -> None:
    """One more step, as that of any other sizes to rounding."""
    _, back = found
    assert back[name] == pytest.approx(back["dp2"], rel=2e-5) and len(back[name]) == 1
