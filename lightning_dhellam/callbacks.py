"""Lightning callbacks: search of a plan, throughput, load of experts, a summary at the end."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_dhellam.autosearch import AutoSearch
from lightning_dhellam.displays import EpochBar, ProgressLines, RankSummary
from lightning_dhellam.expert_load import ExpertLoad
from lightning_dhellam.late import show
from lightning_dhellam.models import ModelConfig, training_flops_per_token
from lightning_dhellam.parallel import Cluster
from lightning_dhellam.predictions import PredictionWriter
from lightning_dhellam.strategy import DHellamStrategy
from lightning_dhellam.values import check_kinds

__all__ = [
    "AutoSearch",
    "EpochBar",
    "ExpertLoad",
    "PredictionWriter",
    "ProgressLines",
    "RankSummary",
    "RunSummary",
    "SaveEnd",
    "ThroughputMonitor",
]


class ThroughputMonitor(Callback):
    """Logs `tokens_per_second` of the whole run, and `mfu` when the device's peak is given.

    MFU counts the FLOPs of the model's matrix products, attention causal-halved, three times for
    forward and backward (PaLM, arXiv 2204.02311, appendix B, with the causal half left out).
    Nothing waits for the device: on CUDA the times come from events that have passed.

    Args:
        window: optimizer steps that a value is averaged over.
        peak_tflops: peak of one device, for example 989 for bf16 on an H100 or H200.
    """

    def __init__(self, window: int = 10, peak_tflops: float | None = None) -> None:
        check_kinds(ThroughputMonitor.__init__, locals())
        if window < 1:
            raise ValueError(f"window={window} must be at least 1 optimizer step")
        self.window = window
        self.peak_tflops = peak_tflops
        self._steps: deque[_Moment] = deque()
        self.tokens_per_second = 0.0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._steps.clear()

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Mapping[str, Tensor],
        batch_idx: int,
    ) -> None:
        samples, length = batch["tokens"].shape
        self._steps.append(_Moment.now(pl_module.device, samples * length * _replicas(trainer)))
        passed = [step for step in self._steps if step.passed]
        if len(passed) < 2:
            return
        first, last = passed[max(0, len(passed) - 1 - self.window)], passed[-1]
        while self._steps[0] is not first:
            self._steps.popleft()
        tokens = sum(step.tokens for step in passed[passed.index(first) + 1 :])
        self.tokens_per_second = tokens / first.seconds_until(last)
        _log(pl_module, "tokens_per_second", self.tokens_per_second)
        show(trainer, "tokens_per_second", self.tokens_per_second)
        if _cluster(trainer) is not None:
            _log(pl_module, "emulated", 1.0)
        config = getattr(pl_module, "model_config", None)
        if self.peak_tflops is not None and isinstance(config, ModelConfig):
            frozen = getattr(pl_module, "lora", None) is not None
            flops = training_flops_per_token(config, length, frozen=frozen)
            share = self.tokens_per_second * flops / _ranks(trainer)
            _log(pl_module, "mfu", share / (self.peak_tflops * 1e12))


class SaveEnd(Callback):
    """Saves the end of training as `last.ckpt`, where a ModelCheckpoint has not saved it already.

    It lies beside the checkpoints of the first ModelCheckpoint, so that `ckpt_path="last"` goes on
    from it. Without a ModelCheckpoint nothing is saved, and that is said.
    """

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        keeps = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
        step, folder = trainer.global_step, keeps[0].dirpath if keeps else None
        if folder is None or getattr(trainer, "fast_dev_run", False):
            rank_zero_info(f"no checkpoint of step {step} was saved: checkpoints are switched off")
            return
        done = [c for c in keeps if c._last_global_step_saved == step]
        if done:
            path = done[0]._last_checkpoint_saved
        else:
            keep = keeps[0]
            path = os.path.join(folder, keep.CHECKPOINT_NAME_LAST + keep.FILE_EXTENSION)
            trainer.save_checkpoint(path, keep.save_weights_only)
        rank_zero_info(f"checkpoint of step {step}: {path}")


class RunSummary(Callback):
    """Prints, at the end of training, what was reached and where the run's files are."""

    def __init__(self) -> None:
        self._first: Tensor | None = None
        self._last: Tensor | None = None
        self._tokens = 0
        self._started = 0.0

    @override
    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._first = self._last = None
        self._tokens = 0
        self._started = time.perf_counter()

    @override
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Mapping[str, Tensor],
        batch_idx: int,
    ) -> None:
        # Not from the trainer's metrics, which wait for the device.
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if loss is not None:
            self._last = loss.detach()
            self._first = self._last if self._first is None else self._first
        self._tokens += batch["tokens"].numel() * _replicas(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = trainer.log_dir or trainer.default_root_dir  # a collective: every rank asks
        if self._first is None or self._last is None:
            return
        losses = torch.stack([self._first, self._last])
        first, last = trainer.strategy.reduce(losses, reduce_op="mean").tolist()
        if not trainer.is_global_zero:
            return
        seconds = time.perf_counter() - self._started
        lines = [
            f"loss        {first:.3f} -> {last:.3f} in {trainer.global_step} steps",
            f"tokens/s    {self._tokens / seconds:,.0f} (mean of the run, {seconds:.0f} s)",
            f"plan        {_plan(trainer)}",
            f"files       {folder}",
        ]
        if not _saves(trainer):
            lines.append("checkpoint  none was saved")
        emulated = _cluster(trainer)
        if emulated is not None:
            lines.insert(0, f"EMULATED    {emulated}; times mean something, numbers do not")
        validation = trainer.callback_metrics.get("val_loss")
        if validation is not None:
            lines.insert(1 + (emulated is not None), f"validation  {validation.item():.3f}")
        print("\n" + "\n".join(lines), flush=True)


def _saves(trainer: pl.Trainer) -> bool:
    """Whether a checkpoint was saved, or will be before the training is over."""
    keeps = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    ends = any(isinstance(c, SaveEnd) for c in getattr(trainer, "callbacks", ()))
    return any(ends or c.save_last or c._last_checkpoint_saved for c in keeps)


@dataclass(frozen=True)
class _Moment:
    """The end of a step, and the tokens that it trained on."""

    tokens: int
    host: float
    event: torch.cuda.Event | None

    @classmethod
    def now(cls, device: torch.device, tokens: int) -> _Moment:
        event = None
        if device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
        return cls(tokens, time.perf_counter(), event)

    @property
    def passed(self) -> bool:
        return self.event is None or bool(self.event.query())

    def seconds_until(self, later: _Moment) -> float:
        if self.event is not None and later.event is not None:
            return self.event.elapsed_time(later.event) / 1000
        return later.host - self.host


def _log(module: pl.LightningModule, name: str, value: float) -> None:
    """Log a number of the host. Lightning would copy it to the device, and wait for that."""
    module.log(name, torch.tensor(value), rank_zero_only=True)


def _cluster(trainer: pl.Trainer) -> Cluster | None:
    """The cluster that a run only pretends to be part of."""
    strategy = trainer.strategy
    return strategy.cluster if isinstance(strategy, DHellamStrategy) else None


def _replicas(trainer: pl.Trainer) -> int:
    """Data-parallel ranks: how many different batches a step sees."""
    strategy = trainer.strategy
    if isinstance(strategy, DHellamStrategy):
        return strategy.context.topology.dp_size
    return int(trainer.world_size)


def _ranks(trainer: pl.Trainer) -> int:
    """Devices that share the work, of an emulated cluster as well."""
    strategy = trainer.strategy
    if isinstance(strategy, DHellamStrategy):
        return strategy.context.topology.world_size
    return int(trainer.world_size)


def _plan(trainer: pl.Trainer) -> str:
    strategy = trainer.strategy
    if not isinstance(strategy, DHellamStrategy):
        return f"none (strategy {type(strategy).__name__})"
    context, plan = strategy.context, strategy.runner.plan_in_use
    if strategy.plan != plan:
        plan = f"{plan} (of {strategy.plan})"
    topology = context.topology
    pipeline = ""
    if topology.pp_size > 1:
        schedule = strategy.runner.agreed.schedule
        pipeline = f" pipeline parallel {topology.pp_size} by {schedule},"
    pipeline += f" context parallel {topology.cp_size}," if topology.cp_size > 1 else ""
    pipeline += f" expert parallel {topology.ep_size}," if topology.ep_size > 1 else ""
    return (
        f"{plan}, tensor parallel {topology.tp_size}, data parallel {topology.dp_size},"
        f"{pipeline} {strategy.root_device.type}"
    )
