"""How many steps fill a given time on this machine: what the demo trains for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from lightning_dhellam.autosearch import AutoSearch
from lightning_dhellam.values import check_kinds

_MEASURED = 10
"""Steps after the search, by which the speed of the others is told; again after twice as many."""


class Pace(Callback):
    """Fits the number of steps to the speed of the machine, once the search of a plan is over.

    It does so again after twice as many steps, and so on, since other work may come or go. The
    schedule of the learning rate is that of the steps which are left then. All ranks take what
    the first one finds.

    Args:
        seconds: that training is to take, with the search.
        fewest: steps to do on a slow machine too.

    Attributes:
        clock: seconds that pass.
    """

    clock: Callable[[], float] = staticmethod(time.perf_counter)

    def __init__(self, seconds: float = 180.0, fewest: int = 100) -> None:
        check_kinds(Pace.__init__, locals())
        self.seconds = seconds
        self.fewest = fewest
        self._start = 0.0
        self._mark: tuple[int, float] | None = None
        self._after = _MEASURED

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._start = self.clock()
        self._mark = None
        self._after = _MEASURED

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        search = AutoSearch.of(trainer)
        if search is not None and not search.over:
            return
        step = trainer.global_step
        if self._mark is None:
            self._mark = step, self._now(pl_module.device)
        elif step - self._mark[0] >= self._after:
            self._after *= 2
            self._fit(trainer, step, self._now(pl_module.device))

    def _now(self, device: torch.device) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a few times in a run
        return self.clock()

    def _fit(self, trainer: pl.Trainer, step: int, now: float) -> None:
        assert self._mark is not None
        (before, then), self._mark = self._mark, (step, now)
        each = max((now - then) / (step - before), 1e-6)
        left = int((self.seconds - (now - self._start)) / each)
        steps = int(trainer.strategy.broadcast(max(step + left, step, self.fewest)))
        first, last = self._after == 2 * _MEASURED, trainer.fit_loop.epoch_loop.max_steps
        trainer.fit_loop.epoch_loop.max_steps = steps
        if not first and abs(steps - last) <= 0.1 * last:
            return
        spent, ahead = now - self._start, (steps - step) * each
        trainer.print(
            f"pace: {step} steps and the search took {spent:.0f} s, and a step takes"
            f" {each * 1e3:.0f} ms: {steps} steps in all will take about"
            f" {(spent + ahead) / 60:.1f} minutes"
        )
