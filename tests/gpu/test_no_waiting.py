"""Whole training steps under a Trainer, for which no host waits for its GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dhellam.callbacks import RunSummary, ThroughputMonitor
from lightning_dhellam.strategy import DHellamStrategy
from tests.ranks import run_ranks
from tests.strategy.runs import Model, Sequences, join, make_trainer
from tests.strategy.test_async_checkpoint import Gate

pytestmark = pytest.mark.gpu

STEADY, STEPS = 4, 8
SECONDS, CYCLES = 3.0, 1.7e9
"""For which the device sleeps while the host issues a step, and its cycles in a second."""
SHAPE = {
    "hidden_size": 256,
    "ffn_hidden_size": 384,
    "num_attention_heads": 16,
    "num_query_groups": 8,
}
RUNS: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "fp8": {"fp8": "current"},
        "fp8-blockwise": {"fp8": "blockwise"},
        "alone": {},
        "offload": {"offload": "all", "recompute": "none"},
        "packed": {},
        "hugging-face": {},
        "beside": {"async_checkpoint": True},
    },
    2: {
        "dp2": {},
        "dp2-beside": {"async_checkpoint": True},
        "tp2": {"tensor_parallel_size": 2},
        "pp2": {"pipeline_parallel_size": 2},
        "pp2-zb-v": {"pipeline_parallel_size": 2, "schedule": "zb-v"},
        "tp2-hugging-face": {"tensor_parallel_size": 2},
    },
}


class Documents(Sequences):
    """Sequences of several documents, other ones in each."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        place, cut = torch.arange(len(sample["tokens"])), 1 + index % 5
        return {**sample, "position_ids": torch.where(place < cut, place, place - cut)}


class HuggingFaces(Sequences):
    """Samples of an odd length as its collators make them, with padding on the left."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = super().__getitem__(index)["tokens"][:-1]
        mask = (torch.arange(len(tokens)) >= index % 4).long()
        labels = tokens.masked_fill(mask == 0, -100)
        return {"input_ids": tokens, "labels": labels, "attention_mask": mask}


class Asleep(Callback):
    """Lets the device sleep through the time in which the host issues a step.

    It begins between two steps, so fetching a batch and moving it to the device is part of it.
    """

    def __init__(self) -> None:
        self.asleep: list[bool] = []
        self._awake: Any = None

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self._awake is not None:
            self.asleep.append(not self._awake.query())
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
        self._awake = None
        if STEADY <= trainer.global_step < STEPS:
            torch.cuda._sleep(int(SECONDS * CYCLES))
            self._awake = torch.cuda.Event()
            self._awake.record()
            torch.cuda.set_sync_debug_mode("error")


class Beside(Callback):
    """Saves after a step, while the device sleeps, and lets the write end after a later one.

    The step before saves as well: the first save takes the host memory.

    Attributes:
        in_flight: at the end of each step between them, whether the checkpoint is.
    """

    def __init__(self, path: Path, first: int, last: int) -> None:
        self.path, self.first, self.last = path, first, last
        self.in_flight: list[bool] = []
        self._gate = Gate()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, DHellamStrategy)
        if trainer.global_step == self.first - 1:
            trainer.save_checkpoint(self.path)
            strategy.wait_for_checkpoint()
        elif trainer.global_step == self.first:
            self._gate.__enter__()
            trainer.save_checkpoint(self.path)
        elif trainer.global_step > self.first:
            self.in_flight.append(strategy._in_flight() == self.path)
        if trainer.global_step == self.last:
            self._gate.__exit__(None, None, None)


def _asleep(
    folder: str, sizes: dict[str, Any], devices: int, data: type[Sequences] = Sequences
) -> list[bool]:
    watch = Asleep()
    # The watch begins when the first of these two steps has ended.
    beside = Beside(Path(folder) / "beside.ckpt", STEADY + 1, STEPS)
    saves = [beside] if sizes.get("async_checkpoint") else []
    trainer = make_trainer(
        {"micro_batch_size": 3, **sizes},
        [*saves, watch, LearningRateMonitor(), ThroughputMonitor(peak_tflops=1.0), RunSummary()],
        accelerator="gpu",
        devices=devices,
        precision="bf16-mixed",
        gradient_clip_val=0.1,
        max_steps=STEPS,
        logger=CSVLogger(folder),
        log_every_n_steps=100,
        enable_progress_bar=True,
    )
    trainer.fit(Model(hidden_dropout=0.1, **SHAPE), DataLoader(data(200), batch_size=8))
    assert all(beside.in_flight) and beside.path.is_dir() is bool(saves)
    return watch.asleep


def _on_rank(rank: int, world: int, folder: str) -> dict[str, list[bool]]:
    join(rank, world)
    data = {
        "packed": Documents,
        "hugging-face": HuggingFaces,
        "tp2-hugging-face": HuggingFaces,
    }
    return {
        name: _asleep(f"{folder}/{name}", sizes, world, data.get(name, Sequences))
        for name, sizes in RUNS[world].items()
    }


@pytest.mark.parametrize("world", RUNS)
def test_a_host_issues_whole_steps_while_its_device_sleeps(world: int, tmp_path: Any) -> None:
    if torch.cuda.device_count() < world:
        pytest.skip(f"needs {world} GPUs, there are {torch.cuda.device_count()}")
    for found in run_ranks(world, _on_rank, world, str(tmp_path), backend="nccl", timeout=280):
        assert found == {name: [True] * (STEPS - STEADY) for name in RUNS[world]}
