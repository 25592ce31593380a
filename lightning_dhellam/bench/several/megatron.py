"""Megatron-core's side of `dhellam bench several`: its model, DDP, schedule and optimizer."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_dhellam.bench.megatron_model import (
    cut_in_pieces,
    forward_backward,
    forward_step,
    gpt_chunks,
)
from lightning_dhellam.bench.several.job import MEGATRON, Job, memory_of
from lightning_dhellam.bench.several.steps import Note, Side, timed
from lightning_dhellam.models import ModelConfig
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.collectives import largest, reduced
from lightning_dhellam.parallel.zigzag import own_part

_WARM_UP = 2
"""Steps before the first that is timed, of each model."""


class Training:
    """Megatron-core's training of one rank. Weights stay as they are: its learning rate is 0.

    Args:
        job: What is trained.
        config: The model.
        context: The groups of this rank.
        chunks: Chunks of layers on each stage of a pipeline: 1 for 1F1B, more to interleave them.
    """

    def __init__(
        self, job: Job, config: ModelConfig, context: ParallelContext, chunks: int
    ) -> None:
        self._job = job
        self._config = config
        self.context = context
        device = context.device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        models = gpt_chunks(
            config,
            context,
            dtype,
            chunks=chunks,
            transformer_engine=job.transformer_engine,
            overlapped_tokens=job.tp_overlap * job.length * job.micro_batch,
        )
        if device.type == "cuda":
            torch.cuda.empty_cache()  # of what the weights were copied from
        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        self._ddp = [
            DistributedDataParallel(model.config, settings, model, pg_collection=context.groups)
            for model in models
        ]
        shared = models[0].config
        shared.finalize_model_grads_func = partial(
            finalize_model_grads, pg_collection=context.groups
        )
        self._optimizer = get_megatron_optimizer(
            OptimizerConfig(
                lr=0.0, bf16=dtype is torch.bfloat16, params_dtype=dtype, clip_grad=0.0
            ),
            self._ddp,
            use_gloo_process_groups=False,
        )
        self._schedule = forward_backward(chunks)
        self._pieces: list[tuple[Tensor, Tensor]] = []
        self.fuses: bool = shared.gradient_accumulation_fusion

    def take(self, count: int) -> None:
        """Train on batches of `count` micro-batches from now on."""
        topology = self.context.topology
        batch = self._job.batch(self._config, count)
        own = {
            name: own_part(
                rows.to(self.context.device)[topology.dp_rank :: topology.dp_size],
                1,
                topology.cp_rank,
                topology.cp_size,
            )
            for name, rows in batch.items()
        }
        self._pieces = cut_in_pieces(own, self._job.micro_batch)

    def gradients(self) -> float:
        """Forward and backward of a step, with the gradients reduced. Returns the global loss."""
        for chunk in self._ddp:
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        several = len(self._ddp) > 1
        parts: Sequence[dict[str, Tensor]] = self._schedule(
            forward_step_func=forward_step,
            data_iterator=[iter(self._pieces) for _ in self._ddp]
            if several
            else iter(self._pieces),
            model=self._ddp if several else self._ddp[0],
            num_microbatches=len(self._pieces),
            seq_length=self._job.length,
            micro_batch_size=self._job.micro_batch,
        )
        own = torch.zeros(1, device=self.context.device)
        if parts:
            own += torch.stack([part["loss"].float() for part in parts]).mean()
        own = reduced(own, self.context.groups.dp_cp)
        # The last stage has it.
        return float(largest(own if parts else own.fill_(-torch.inf), dist.group.WORLD))

    def update(self) -> None:
        """Step the optimizer on the gradients."""
        self._optimizer.step()

    def grad_norm(self) -> float:
        """The 2-norm of the whole model's gradient, before an update."""
        self._optimizer.prepare_grads()
        return float(self._optimizer.get_grad_norm())


def measure(job: Job, device: torch.device, note: Note, folder: Path) -> None:
    """Train some steps by each schedule, and note their times, loss and gradient norm."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, device_id=device if backend == "nccl" else None)
    context = ParallelContext.create(
        device,
        tensor_parallel_size=job.tensor,
        pipeline_parallel_size=job.pipeline,
        context_parallel_size=job.context,
        expert_parallel_size=job.experts,
        tuned=False,
    )
    config = job.config(memory_of(device))
    # Where torch chooses itself it takes flash attention, which is half as fast.
    attention = sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION])
    with context.megatron(), attention if device.type == "cuda" else nullcontext():
        for chunks in job.schedules or ("1",):
            training = Training(job, config, context, int(chunks))
            for count in job.counts:
                training.take(count)
                row = {"layers": config.num_layers, **_how(chunks)}
                note({**_measured(training, job, count), **row})
            del training
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    context.destroy()
    dist.destroy_process_group()


def _how(chunks: str) -> dict[str, str]:
    if chunks == "1":
        return {"row": MEGATRON, "schedule": "1f1b"}
    return {"row": f"{MEGATRON}:{chunks}", "schedule": f"interleaved-1f1b, {chunks} chunks"}


def _measured(training: Training, job: Job, count: int) -> dict[str, Any]:
    if count == job.counts[0]:
        for _ in range(_WARM_UP):
            training.gradients()
            training.update()
    side = Side(training.gradients, training.grad_norm, training.update)
    return {
        "micro-batches": count,
        **timed(side, training.context.device, job.steps_of(count)),
        "transformer-engine": job.transformer_engine,
        "tp-overlap": job.tp_overlap,
        "gradient accumulation fusion": training.fuses,
        "connections": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"),
    }
