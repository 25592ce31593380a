"""A training step under the strategy reads no memory of the device on the host.

On the CPU nothing tells the device's memory from the host's, so here every read counts: what a
tensor's value decides, prints or returns to Python.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_dhellam.callbacks import RunSummary, ThroughputMonitor
from lightning_dhellam.engine import intake
from lightning_dhellam.strategy import feeding
from tests.ranks import run_ranks
from tests.strategy.runs import Model, join, loader, make_trainer

READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
"""Operators for which the host has to know what the device has computed."""
LATE = ("item", "tolist", "numpy", "cpu")
"""Methods that read without an operator of their own on the CPU."""
STEADY, STEPS = 2, 6
"""After how many steps nothing is done for the first time, and the last step."""


class Reads(TorchDispatchMode):
    """Notes where values are read."""

    def __init__(self, allowed: set[int]) -> None:
        super().__init__()
        self.found: list[str] = []
        self.allowed = allowed

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        masks = name == "aten::index" and any(
            i.dtype is torch.bool for i in args[1] if i is not None
        )
        if (name in READS or masks) and args[0].data_ptr() not in self.allowed:
            self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, what: str) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # which may wait
        frames = [f"{f.filename}:{f.lineno}" for f in traceback.extract_stack()[-9:-2]]
        self.found.append(f"{what} at " + " < ".join(reversed(frames)))


@contextmanager
def watched(reads: Reads) -> Iterator[None]:
    """Note in `reads` what is read inside."""
    kept = {name: getattr(Tensor, name) for name in LATE}

    def noting(name: str) -> Any:
        def method(self: Tensor, *args: Any, **options: Any) -> Any:
            if self.data_ptr() not in reads.allowed:
                reads.note(f"Tensor.{name}")
            return kept[name](self, *args, **options)

        return method

    try:
        for name in LATE:
            setattr(Tensor, name, noting(name))
        with reads:
            yield
    finally:
        for name, method in kept.items():
            setattr(Tensor, name, method)


class Watch(Callback):
    """Watches the training loop from the beginning of one step to the end of a later one."""

    def __init__(self) -> None:
        self.found: list[str] | None = None
        self._reads: Reads | None = None
        self._inside: Any = None

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == STEADY:
            # Adam counts its steps in tensors that stay on the host.
            states = trainer.optimizers[0].state.values()
            self._reads = Reads({state["step"].data_ptr() for state in states})
            self._inside = watched(self._reads)
            self._inside.__enter__()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == STEPS and self._reads is not None:
            self._inside.__exit__(None, None, None)
            self.found = self._reads.found


class Save(Callback):
    """Saves after a step. Lightning's own callback reads as well: numbers that it has on the host.

    Args:
        folder: that the checkpoint is written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == STEADY + 1:
            trainer.save_checkpoint(self.folder / "beside.ckpt")


def _reads(folder: str, sizes: dict[str, Any], **options: Any) -> list[str] | None:
    watch = Watch()
    beside = sizes.get("async_checkpoint", False)
    saves = [Save(Path(folder))] if beside else []
    trainer = make_trainer(
        {"micro_batch_size": 3, **sizes},
        # The first callback, whose hook comes before the strategy's and the others'.
        [watch, LearningRateMonitor(), ThroughputMonitor(), RunSummary(), *saves],
        max_steps=STEPS,
        logger=CSVLogger(folder),
        log_every_n_steps=100,
        **options,
    )
    trainer.fit(Model(hidden_dropout=0.1), loader(sizes))
    assert len(saves) == len([*Path(folder).glob("*.ckpt")])
    return watch.found


def _on_rank(rank: int, world: int, folder: str, runs: list[tuple[Any, Any]]) -> list[Any]:
    join(rank, world)
    # They look at batches that are on the host.
    intake.check_ids = lambda *_: None  # type: ignore[assignment]
    feeding.digest = lambda *_: 0  # type: ignore[assignment]
    return [_reads(folder, sizes, **options) for sizes, options in runs]


RUNS: dict[int, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    1: [
        ({}, {"gradient_clip_val": 0.1}),
        ({}, {"precision": "bf16-mixed"}),
        ({"async_checkpoint": True}, {"precision": "bf16-mixed"}),
    ],
    2: [
        ({}, {"gradient_clip_val": 0.1, "precision": "bf16-mixed"}),
        ({"distributed_optimizer": False}, {"gradient_clip_val": 0.1}),
        ({"tensor_parallel_size": 2}, {"gradient_clip_val": 0.1}),
        ({"pipeline_parallel_size": 2, "schedule": "zb-v"}, {"gradient_clip_val": 1e-3}),
        ({"context_parallel_size": 2}, {"gradient_clip_val": 0.1}),
        ({}, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}),
    ],
}


@pytest.mark.parametrize("world", RUNS)
def test_a_step_in_the_steady_state_reads_nothing_on_the_host(world: int, tmp_path: Any) -> None:
    for rank in run_ranks(world, _on_rank, world, str(tmp_path), RUNS[world]):
        for (sizes, options), found in zip(RUNS[world], rank, strict=True):
            assert found == [], (sizes, options)


def test_reads_are_noticed() -> None:
    x = torch.ones(3)
    reads = Reads({x.data_ptr()})
    with watched(reads):
        y = x * 2
        assert x[0].item() == 1
        assert not reads.found
        _ = float(y[0]), bool(y[1] > 0), y.tolist(), y.numpy(), x.eq(1).nonzero(), y[y > 1]
    assert len(reads.found) >= 6, reads.found
