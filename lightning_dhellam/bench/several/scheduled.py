"""Our side of `dhellam bench several` by schedules: one model, walked in one order after the other.

A profile of its operators predicts the step of each, and `auto` is the fastest of those that were
predicted best: what `schedule='auto'` comes to in a run.
"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_dhellam.autosearch.schedules import SEARCHED, TRIED, Forecast, forecast
from lightning_dhellam.bench.scheduling import Measured
from lightning_dhellam.bench.several.job import AUTO, Job, memory_of
from lightning_dhellam.bench.several.steps import Note, Side, Watch, timed
from lightning_dhellam.pipeline.schedules import Scheme, scheme_of
from lightning_dhellam.runner import Runner
from lightning_dhellam.search.pipeline import Effort


def measure(job: Job, device: torch.device, note: Note) -> None:
    """Train some steps by each schedule, and note times, predictions, loss and gradient norm."""
    cuda = device.type == "cuda"
    config = job.config(memory_of(device))
    runner = Runner.create(
        config,
        device,
        tensor_parallel_size=job.tensor,
        pipeline_parallel_size=job.pipeline,
        context_parallel_size=job.context,
        expert_parallel_size=job.experts,
        micro_batch_size=job.micro_batch,
        precision="bf16-mixed" if cuda else "32-true",
        plan=job.plan,
    )
    with runner:
        optimizer = runner.optimizer(
            torch.optim.AdamW(runner.model.parameters(), lr=0.0, fused=cuda)
        )
        training = _Training(job, runner, optimizer.step)
        training.take(job.counts[0])
        training.step()
        clock = Watch()
        found = training.measured()
        shared: dict[str, Any] = {"layers": config.num_layers, "profile s": clock.lap()}
        shared["transfers"] = [asdict(row) for row in found.profile.transfers]
        for count in job.counts:
            training.take(count)
            clock.lap()
            known = training.forecast(found)
            training.measure(
                known, note, {**shared, "micro-batches": count, "search s": clock.lap()}
            )


class _Training:
    """Steps of one rank. Weights stay as they are: the learning rate is 0."""

    def __init__(self, job: Job, runner: Runner, update: Any) -> None:
        self._job = job
        self._runner = runner
        self._update = update
        self._batch: dict[str, Tensor] = {}
        self._count = 0

    def take(self, count: int) -> None:
        """Train on batches of `count` micro-batches from now on."""
        topology = self._runner.context.topology
        rows = self._job.batch(self._runner.model.config, count)
        self._count = count
        self._batch = {
            name: values[topology.dp_rank :: topology.dp_size].to(self._runner.device)
            for name, values in rows.items()
        }

    def gradients(self) -> float:
        """Forward and backward of a step. Returns the global loss."""
        return float(self._runner.mean(self._runner.train(self._batch)))

    def step(self) -> None:
        """A whole step."""
        self.gradients()
        self._update()

    def measured(self) -> Measured:
        """What the run has shown so far."""
        return Measured.of(self._runner, self._batch)

    def forecast(self, known: Measured) -> Forecast:
        """What schedules would take, with the plan that the run has."""
        return forecast(
            self._runner,
            known.costs,
            known.builder,
            busy=known.busy(self._runner, self._count),
            tokens=known.tokens,
            micro_batches=self._count,
            links=known.links,
            effort=Effort() if AUTO in self._job.schedules else None,
        )

    def measure(self, known: Forecast, note: Note, shared: dict[str, Any]) -> None:
        """Measure each schedule once, `auto` with those that it chooses from as the last."""
        stages, found = self._runner.engine.stage.count, dict[str, dict[str, Any]]()
        wanted = {name: partial(scheme_of, name, stages) for name in self._job.schedules}
        wanted.pop(AUTO, None)
        for name, make in wanted.items():
            found[name] = shared | self._measured(name, make(), known)
            note(found[name])
        if AUTO in self._job.schedules:
            rivals = known.fitting[:TRIED] or tuple(known.ranking)[:1]
            for name in rivals:
                if name not in found:
                    found[name] = shared | self._measured(name, known.schemes[name], known)
            best = min(rivals, key=lambda name: float(found[name]["seconds"]))
            reasons = {name: one.reason for name, one in known.ranking.items()}
            detail = {"installed": best, "behind": reasons}
            if SEARCHED in known.schemes:
                made = known.schemes[SEARCHED](stages, self._count)
                detail["searched"] = str(made)
            note({**found[best], "schedule": f"{AUTO}: {best}", **detail})

    def _measured(self, name: str, scheme: Scheme, known: Forecast) -> dict[str, Any]:
        self._runner.use_schedule(name, scheme)
        if self._count == self._job.counts[0]:
            self.step()
        else:  # what a first step does besides, and not the step itself, which may take seconds
            self._runner.engine.rehearse(self._runner.intake.micro_batches(self._batch))
        played = known.ranking.get(name)
        side = Side(self.gradients, lambda: float(self._runner.grad_norm()), self._update)
        return {
            "schedule": name,
            **timed(side, self._runner.device, self._job.steps_of(self._count)),
            "predicted": played.run.seconds if played is not None else None,
        }
