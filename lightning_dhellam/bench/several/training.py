"""Our model of a job, and steps of it on the batches that all sides train on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.bench.several.job import Job, memory_of
from lightning_dhellam.bench.several.steps import Side
from lightning_dhellam.bench.shapes import rank_of
from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel import Cluster, Link
from lightning_dhellam.precision import PRECISIONS
from lightning_dhellam.runner import Runner


@contextmanager
def runner_of(job: Job, device: torch.device) -> Iterator[Runner]:
    """What trains the model of a job: on all of its processes, or one that plays a rank of them."""
    config = job.config(memory_of(device))
    precision = "bf16-mixed" if device.type == "cuda" else "32-true"
    options: dict[str, Any] = {"micro_batch_size": job.micro_batch, "plan": job.plan}
    options["schedule"] = "fold"  # by which plans are compared, as both strands meet in all of it
    if job.emulate is None:
        with Runner.create(
            config,
            device,
            tensor_parallel_size=job.tensor,
            pipeline_parallel_size=job.pipeline,
            context_parallel_size=job.context,
            expert_parallel_size=job.experts,
            precision=precision,
            context_exchange="auto" if job.context > 1 and job.plans else "ring",
            **options,
        ) as runner:
            runner.is_searched = bool(job.plans)
            yield runner
        return
    fields = dict(job.emulate)
    link = Link(fields["bandwidth"], fields["latency"], int(fields["sms"]))
    cluster = Cluster(job.tensor, {"tp": link}, name="the measured link")
    with rank_of(cluster, job.tensor, device) as context:
        model = CausalLM(config, context, PRECISIONS[precision].dtype).to(device)
        with Runner(model, precision=precision, **options) as runner:
            yield runner


class Training:
    """Steps of one rank. Weights stay as they are: the learning rate is 0."""

    def __init__(self, job: Job, runner: Runner) -> None:
        self._job = job
        self.runner = runner
        self.batch: dict[str, Tensor] = {}
        self.count = 0
        fused = runner.device.type == "cuda"
        optimizer = torch.optim.AdamW(runner.model.parameters(), lr=0.0, fused=fused)
        self._update: Callable[[], Any] = runner.optimizer(optimizer).step

    def take(self, count: int) -> None:
        """Train on batches of `count` micro-batches from now on."""
        topology = self.runner.context.topology
        rows = self._job.batch(self.runner.model.config, count)
        self.count = count
        self.batch = {
            name: values[topology.dp_rank :: topology.dp_size].to(self.runner.device)
            for name, values in rows.items()
        }

    def gradients(self) -> float:
        """Forward and backward of a step. Returns the global loss."""
        return float(self.runner.mean(self.runner.train(self.batch)))

    def step(self) -> None:
        """A whole step."""
        self.gradients()
        self._update()

    def settle(self) -> None:
        """Do besides what a first step by a plan or schedule does, so that the next is as others.

        Where steps are longer than the first ones were, not the step itself, which may take
        seconds.
        """
        if self.count == self._job.counts[0]:
            self.step()
        else:
            self.runner.engine.rehearse(self.runner.intake.micro_batches(self.batch))

    @property
    def side(self) -> Side:
        """What is timed of it."""
        return Side(self.gradients, lambda: float(self.runner.grad_norm()), self._update)
