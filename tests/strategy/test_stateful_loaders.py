"""Any loader that keeps its place goes on in mid-epoch with the next sample."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import IterableDataset, default_collate

from tests.strategy.runs import Losses, Model, Sequences, make_trainer

BATCH, SAMPLES, STEPS, SAVED = 4, 24, 10, 4  # 6 steps are an epoch


class _Batches:
    """A loader of one's own, of another order in each epoch."""

    def __init__(self) -> None:
        self.data, self.epoch, self.given = Sequences(SAMPLES), 0, 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        if self.given == SAMPLES // BATCH:
            self.epoch, self.given = self.epoch + 1, 0
        generator = torch.Generator().manual_seed(self.epoch)
        order = torch.randperm(SAMPLES, generator=generator).tolist()
        while self.given < SAMPLES // BATCH:
            self.given += 1
            places = order[BATCH * (self.given - 1) : BATCH * self.given]
            yield default_collate([self.data[place] for place in places])

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.given = state["epoch"], state["given"]


class _Sized(_Batches):
    def __len__(self) -> int:
        return SAMPLES // BATCH


class _Stream(IterableDataset[dict[str, Tensor]]):
    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        data = Sequences(SAMPLES)
        return (data[place] for place in range(SAMPLES))


def _torchdata(kind: str) -> Any:
    loader = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    if kind == "torchdata of a stream":
        return loader(_Stream(), batch_size=BATCH)
    generator = torch.Generator().manual_seed(2)
    return loader(Sequences(SAMPLES), batch_size=BATCH, shuffle=True, generator=generator)


MAKERS: dict[str, Any] = {
    "own": _Batches,
    "own with a length": _Sized,
    "torchdata": lambda: _torchdata("torchdata"),
    "torchdata of a stream": lambda: _torchdata("torchdata of a stream"),
}


class _Watch(Callback):
    """Notes what steps are given, and saves after one of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: list[list[int]] = []

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, *_: Any) -> None:
        self.seen.append(batch["index"].tolist())

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == SAVED:
            trainer.save_checkpoint(self.path)


def _fit(loader: Any, path: Path, **run: Any) -> tuple[list[list[int]], list[float]]:
    watch, losses = _Watch(path), Losses()
    trainer = make_trainer({}, [losses, watch], max_steps=STEPS, use_distributed_sampler=False)
    trainer.fit(Model(num_layers=1), loader, **run)
    return watch.seen, losses.values


@pytest.mark.parametrize("kind", MAKERS)
def test_a_run_goes_on_with_the_next_sample(kind: str, tmp_path: Path) -> None:
    straight, losses = _fit(MAKERS[kind](), tmp_path / "a.ckpt")
    assert len(straight) == STEPS and sorted(chain(*straight[:6])) == [*range(SAMPLES)]
    resumed, others = _fit(MAKERS[kind](), tmp_path / "b.ckpt", ckpt_path=tmp_path / "a.ckpt")
    left = 6 - SAVED
    assert resumed[:left] == straight[SAVED:6] and others[:left] == losses[SAVED:6]
    assert len(resumed) == STEPS - SAVED
    assert len({*chain(*resumed[left:])}) == len([*chain(*resumed[left:])])
    if kind != "torchdata":  # whose generator of the next epoch is its own affair
        assert resumed == straight[SAVED:] and others == losses[SAVED:]
