"""Our side of `dhellam bench several`: a Trainer with the strategy, which searches while it trains.

The search tries every plan on real steps in turn, so its outcomes are the plans' times; some steps
more with the plan that it installs give the time of a whole step, optimizer included.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dhellam.autosearch import AutoSearch
from lightning_dhellam.bench.several.job import Job, memory_of
from lightning_dhellam.models import ModelConfig
from lightning_dhellam.module import DualStrandMixin
from lightning_dhellam.parallel import Cluster, Link
from lightning_dhellam.parallel.collectives import reduced
from lightning_dhellam.plan.file import PlanFile
from lightning_dhellam.search.measure import Profile
from lightning_dhellam.strategy import DHellamStrategy

_LEARNING_RATE = 1e-4
_STEPS = 1000
"""More than a search needs."""


class _Module(DualStrandMixin):
    def __init__(self, config: ModelConfig, job: Job) -> None:
        super().__init__()
        self.model_config = config
        self.job = job

    def train_dataloader(self) -> DataLoader[Any]:
        """The same batch again and again: every plan is timed on the same work."""
        dealt = self.trainer.distributed_sampler_kwargs
        assert dealt is not None and self.model_config is not None
        batch = {
            name: rows[dealt["rank"] :: dealt["num_replicas"]]
            for name, rows in self.job.batch(self.model_config, self.job.counts[0]).items()
        }
        count = len(batch["tokens"])
        rows = [{name: values[i] for name, values in batch.items()} for i in range(count)]
        return DataLoader(rows * _STEPS, batch_size=count)  # type: ignore[arg-type]

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        return self.batch_loss(batch)

    def configure_optimizers(self) -> Any:
        fused = self.device.type == "cuda"
        return torch.optim.AdamW(self.parameters(), lr=_LEARNING_RATE, fused=fused)


class _Watch(pl.Callback):
    """Notes loss and gradient norm of the first step, and times steps after the search."""

    def __init__(self, search: AutoSearch, steps: int, device: torch.device) -> None:
        self.search = search
        self.steps = steps
        self.device = device
        self.first: dict[str, Tensor] = {}
        self.seconds: list[float] = []
        self.processors = 0
        self._begin = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(trainer.strategy, DHellamStrategy)
        self.processors = trainer.strategy.runner.engine.lanes.processors

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._begin = self._now()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any
    ) -> None:
        assert isinstance(trainer.strategy, DHellamStrategy)
        if "grad norm" not in self.first:
            self.first["grad norm"] = trainer.strategy.runner.grad_norm()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if "loss" not in self.first:
            assert isinstance(trainer.strategy, DHellamStrategy)
            own = outputs["loss"].detach().clone()
            self.first["loss"] = reduced(own, trainer.strategy.context.groups.dp)
        if self.search.findings is None:
            return
        if not self.seconds and self.device.type == "cuda":
            # The profile holds what no step of training does.
            torch.cuda.reset_peak_memory_stats(self.device)
        self.seconds.append(self._now() - self._begin)
        # The first of them follows the search, which has written files meanwhile.
        trainer.should_stop = len(self.seconds) > self.steps

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning would copy their state to the host, which takes longer than the search.
        trainer.strategy.optimizers = []

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def measure(job: Job, device: torch.device, folder: Path) -> dict[str, Any]:
    """Train until the search is over and some steps more, and return what both have measured."""
    config = job.config(memory_of(device))
    search = AutoSearch(rounds=job.rounds, folder=str(folder))
    watch = _Watch(search, job.steps, device)
    strategy = DHellamStrategy(
        tensor_parallel_size=job.tensor,
        pipeline_parallel_size=job.pipeline,
        context_parallel_size=job.context,
        expert_parallel_size=job.experts,
        micro_batch_size=job.micro_batch,
        plan=_plan(job, folder),
        emulate=_cluster(job),
    )
    trainer = pl.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=job.processes,
        precision="bf16-mixed" if device.type == "cuda" else "32-true",
        strategy=strategy,
        max_steps=_STEPS,
        callbacks=[search, watch],
        logger=False,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(_Module(config, job))
    findings = search.findings
    assert findings is not None
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return {
        "layers": config.num_layers,
        "micro-batches": job.counts[0],
        "step s": median(watch.seconds[1:]),
        "steps s": watch.seconds[1:],
        "peak GiB": peak,
        "winner": findings.winner,
        "search": dict(findings.seconds),
        "link": _measured_link(job, config, findings.profile, watch.processors),
        "plans": [
            {
                "plan": outcome.name,
                "seconds": outcome.measured,
                "spread": outcome.spread,
                "predicted": outcome.predicted,
                "exposed": sum(outcome.exposed.values()),
            }
            for outcome in findings.outcomes
        ],
        **{name: value.item() for name, value in watch.first.items()},
    }


def _plan(job: Job, folder: Path) -> str:
    """The plan that the strategy is given.

    A file comes from another run, whose conditions, such as links that are real, need not be met.
    """
    if not job.plan.endswith(".json"):
        return job.plan
    copy = folder / "given.json"
    replace(PlanFile.load(job.plan), conditions={}).save(copy)
    return str(copy)


def _cluster(job: Job) -> Cluster | None:
    if job.emulate is None:
        return None
    fields = dict(job.emulate)
    link = Link(fields["bandwidth"], fields["latency"], int(fields["sms"]))
    return Cluster(job.tensor, {"tp": link}, name="the measured link")


def _measured_link(
    job: Job, config: ModelConfig, profile: Profile, processors: int
) -> dict[str, float] | None:
    """Bytes that cross the link for a gather, the seconds that it takes alone, and on what."""
    alone = {row.operator: row.median for row in profile.timings if row.partner is None}
    for keys in profile.operators.values():
        if "qkv.gather" in keys:
            tokens = job.length * job.micro_batch
            itemsize = 2 if profile.fingerprint.dtype == "bfloat16" else 4
            whole = itemsize * config.hidden_size * tokens
            crossing = whole * (job.tensor - 1) / job.tensor
            return {"bytes": crossing, "seconds": alone[keys["qkv.gather"]], "sms": processors}
    return None
