"""Trains one side of a case under a Trainer, and times its steps."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dhellam.bench.report import pick_device
from lightning_dhellam.bench.throughput.modules import Ours, Theirs
from lightning_dhellam.bench.throughput.operators import operator_times
from lightning_dhellam.bench.throughput.settings import COMPILED, OURS, Case, Job
from lightning_dhellam.plan.by_layer import USUAL
from lightning_dhellam.runner import Runner
from lightning_dhellam.strategy import DHellamStrategy

Tell = Callable[[str], None]
"""Is told how far a side is."""


class _Watch(pl.Callback):
    """Starts the timer after the warm-up and stops it after the last step."""

    def __init__(self, job: Job, case: Case, device: torch.device, tell: Tell) -> None:
        self.tell = tell
        self.job = job
        self.case = case
        self.device = device
        self.losses: list[Tensor] = []
        self.norm: Tensor | None = None
        self.begin = self.seconds = self.peak = 0.0
        self.operators: list[dict[str, Any]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.tell("in its first step, in which kernels are compiled")

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        if trainer.global_step == 0:
            strategy = trainer.strategy
            if isinstance(strategy, DHellamStrategy):
                self.norm = strategy.runner.grad_norm()
            else:
                grads = (p.grad for p in pl_module.parameters() if p.grad is not None)
                self.norm = torch.stack([grad.float().norm() for grad in grads]).norm()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self.losses.append(outputs["loss"].detach())
        if not self.begin:  # what is told is written to a disk, which would be timed
            self.tell(f"after {len(self.losses)} batches of its warm-up")
        samples = (batch_idx + 1) * len(batch["tokens"])
        if samples == self.job.warm_up * self.case.micro_batches:
            self._synchronize()
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            self.tell("in the steps that are timed")
            self.begin = time.perf_counter()
        if samples == (self.job.warm_up + self.job.steps) * self.case.micro_batches:
            self._synchronize()
            self.seconds = time.perf_counter() - self.begin
            if self.device.type == "cuda":
                self.peak = torch.cuda.max_memory_allocated() / 2**30
            if self.job.operators and isinstance(trainer.strategy, DHellamStrategy):
                self._time_operators(trainer.strategy.runner, batch)

    def _time_operators(self, runner: Runner, batch: Any) -> None:
        def train() -> None:
            runner.train(batch)

        self.operators = operator_times(runner.engine, train, self.case.length, self.device)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def result(self) -> dict[str, Any]:
        assert self.norm is not None and self.seconds
        # Lightning divides the loss of a micro-batch by their number when it accumulates.
        steps = self.job.warm_up + self.job.steps
        each = torch.stack(self.losses).float().view(steps, -1).sum(dim=1)
        return {
            "tokens": self.job.steps * self.case.micro_batches * self.case.length,
            "seconds": self.seconds,
            "peak GiB": self.peak or None,
            "losses": each.tolist(),
            "grad norm": self.norm.item(),
            "operators": self.operators,
        }


def _quiet(stage: str) -> None:
    """Nobody asks how far it is."""


def measure(job: Job, tell: Tell = _quiet) -> dict[str, Any]:
    """Train one side, and tell how far it is.

    Returns:
        `tokens` and `seconds` of the timed steps, `peak GiB`, the `losses` of all steps, the
        `grad norm` of the first, and the times of its `operators`.
    """
    device, case = pick_device(job.device), Case.parse(job.case)
    watch = _Watch(job, case, device, tell)
    tell("while its model was built")
    module: pl.LightningModule
    who, _, fp8 = job.side.partition(":")
    if who == OURS:
        # One batch to an optimizer step, which the strategy cuts.
        module, samples, accumulate = Ours(case, device), case.micro_batches, 1
        again = case.recompute or USUAL
        strategy: Any = DHellamStrategy(
            micro_batch_size=1,
            plan=job.plan,
            recompute=again,
            fp8=fp8 or None,
            # A CPU has no kernels in 8 bits: it rehearses what they compute.
            kernels={"fp8": "reference"} if fp8 and device.type == "cpu" else None,
        )
        precision: Any = "bf16-mixed"
    else:
        module = Theirs(case, device, compiled=job.side == COMPILED, fp8=fp8 or None)
        samples, accumulate, strategy, precision = 1, case.micro_batches, "auto", "bf16-true"
    steps = job.warm_up + job.steps
    trainer = pl.Trainer(
        accelerator=job.device,
        devices=1,
        precision=precision,
        strategy=strategy,
        accumulate_grad_batches=accumulate,
        max_steps=steps,
        callbacks=[watch],
        logger=False,
        use_distributed_sampler=False,  # it would shuffle
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, _loader(case, steps * case.micro_batches, samples))
    return watch.result()


def _loader(case: Case, count: int, samples: int) -> Iterable[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    size = (count, case.length + 1)
    tokens = torch.randint(0, case.config.vocab_size, size, generator=generator)
    rows = [{"tokens": row[:-1], "labels": row[1:]} for row in tokens]
    pin = torch.cuda.is_available()
    return DataLoader(rows, batch_size=samples, pin_memory=pin)  # type: ignore[arg-type]
