"""Megatron-core's side of `dhellam bench several`: its model, DDP, schedule and optimizer."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_dhellam.bench.megatron_model import (
    cut_in_pieces,
    forward_step,
    gpt_model,
)
from lightning_dhellam.bench.several.job import Job, memory_of
from lightning_dhellam.models import ModelConfig
from lightning_dhellam.parallel import ParallelContext
from lightning_dhellam.parallel.collectives import largest, reduced
from lightning_dhellam.parallel.zigzag import own_part

_WARM_UP = 3
_LEARNING_RATE = 1e-4


class Training:
    """Megatron-core's training of one rank.

    Args:
        job: What is trained.
        config: The model.
        context: The groups of this rank.
    """

    def __init__(self, job: Job, config: ModelConfig, context: ParallelContext) -> None:
        self._job = job
        self._context = context
        device = context.device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        batch = {name: rows.to(device) for name, rows in job.batch(config).items()}
        topology = context.topology
        own = {
            name: own_part(
                rows[topology.dp_rank :: topology.dp_size], 1, topology.cp_rank, topology.cp_size
            )
            for name, rows in batch.items()
        }
        self._pieces = cut_in_pieces(own, job.micro_batch)
        model = gpt_model(config, context, dtype, transformer_engine=job.transformer_engine)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # of what the weights were copied from
        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
        self._ddp = DistributedDataParallel(
            model.config, settings, model, pg_collection=context.groups
        )
        model.config.finalize_model_grads_func = partial(
            finalize_model_grads, pg_collection=context.groups
        )
        self._optimizer = get_megatron_optimizer(
            OptimizerConfig(
                lr=_LEARNING_RATE, bf16=dtype is torch.bfloat16, params_dtype=dtype, clip_grad=0.0
            ),
            [self._ddp],
            use_gloo_process_groups=False,
        )
        self._schedule = get_forward_backward_func()
        self.fuses: bool = model.config.gradient_accumulation_fusion

    def gradients(self) -> Tensor | None:
        """Forward and backward of a step, with the gradients reduced. Returns the loss."""
        self._ddp.zero_grad_buffer()
        self._optimizer.zero_grad()
        parts: Sequence[dict[str, Tensor]] = self._schedule(
            forward_step_func=forward_step,
            data_iterator=iter(self._pieces),
            model=self._ddp,
            num_microbatches=len(self._pieces),
            seq_length=self._job.length,
            micro_batch_size=self._job.micro_batch,
        )
        return torch.stack([part["loss"] for part in parts]).mean() if parts else None

    def update(self) -> None:
        """Step the optimizer on the gradients."""
        self._optimizer.step()

    def grad_norm(self) -> float:
        """The 2-norm of the whole model's gradient, before an update."""
        self._optimizer.prepare_grads()
        return float(self._optimizer.get_grad_norm())


def measure(job: Job, device: torch.device) -> dict[str, Any]:
    """Train some steps, and return their times, the first loss and the first gradient norm."""
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
        training = Training(job, config, context)
        loss = training.gradients()
        first = torch.zeros(1, device=device) if loss is None else loss.reshape(1).float()
        first = reduced(first, context.groups.dp_cp)
        norm = training.grad_norm()
        training.update()
        times = [_timed(training, device) for _ in range(_WARM_UP + job.steps)][_WARM_UP:]
    if loss is None:
        first.fill_(-torch.inf)
    found = {
        "layers": config.num_layers,
        "loss": float(largest(first, dist.group.WORLD)),
        "grad norm": norm,
        "seconds": median(gradients for gradients, _ in times),
        "step s": median(whole for _, whole in times),
        "steps s": [whole for _, whole in times],
        "peak GiB": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "transformer-engine": job.transformer_engine,
        "gradient accumulation fusion": training.fuses,
        "connections": os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS"),
    }
    context.destroy()
    dist.destroy_process_group()
    return found


def _timed(training: Training, device: torch.device) -> tuple[float, float]:
    """Seconds until the gradients are there, and of the whole step, on the slowest rank."""
    dist.barrier()
    _synchronize(device)
    begin = time.perf_counter()
    training.gradients()
    _synchronize(device)
    middle = time.perf_counter()
    training.update()
    _synchronize(device)
    seconds = torch.tensor([middle - begin, time.perf_counter() - begin], dtype=torch.float64)
    gradients, whole = largest(seconds, dist.group.WORLD).tolist()
    return gradients, whole


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
