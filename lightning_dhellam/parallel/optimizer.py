"""Megatron-core's optimizers around the user's own torch optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import (
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
)
from torch import Tensor
from torch.optim import Optimizer

from lightning_dhellam.parallel.context import ParallelContext
from lightning_dhellam.parallel.gradients import GradientBuffers
from lightning_dhellam.parallel.masters import StepsFollow
from lightning_dhellam.parallel.optimizer_state import (
    Names,
    Restored,
    from_numbers,
    named,
    restore,
)
from lightning_dhellam.parallel.skipping import SkippedSteps, SkippingOptimizer
from lightning_dhellam.versions import gradients_for_norm

ELEMENTWISE = "elementwise"
"""What the class of an optimizer says of itself if its rule looks at each element alone."""


def can_shard(optimizer: Optimizer) -> bool:
    """Whether Megatron's distributed optimizer takes it, and its rule allows for that.

    Megatron takes AdamW and what is derived from it. A rank has flat parts of parameters, so a
    derived class must say that it needs no whole ones: `elementwise = True`.
    """
    if type(optimizer) is torch.optim.AdamW:
        return True
    return isinstance(optimizer, torch.optim.AdamW) and getattr(optimizer, ELEMENTWISE, False)


def shards(
    optimizer: Optimizer, asked: bool | None, precision: str, data_parallel_size: int
) -> bool:
    """Whether the state of `optimizer` is spread over data-parallel ranks.

    Args:
        optimizer: the user's.
        asked: `distributed_optimizer` as the user gave it; None to spread it where that helps.
        precision: of the run.
        data_parallel_size: ranks that it can be spread over.

    Raises:
        ValueError: it was asked for where it cannot work.
    """
    possible = can_shard(optimizer) and precision != "bf16-true"
    if asked is None:
        return possible and data_parallel_size > 1
    if asked and not possible:
        raise ValueError(
            f"distributed_optimizer=True does not work with {type(optimizer).__name__} and"
            f" precision='{precision}': it needs '32-true' or 'bf16-mixed', and torch.optim.AdamW"
            f" or a class derived from it that says {ELEMENTWISE} = True, since its rule looks at"
            " each element alone; or leave distributed_optimizer out"
        )
    return asked


class ModelParallelOptimizer:
    """Steps the user's optimizer on Megatron's gradient buffers.

    After construction the user's optimizer holds the parameters that it really steps: fp32 master
    weights for a 16-bit model, and with `sharded` only this rank's part of them.

    Args:
        optimizer: the user's, as `configure_optimizers` returned it.
        buffers: of the gradients.
        context: groups of this rank.
        names: of the parameters.
        sharded: Megatron's distributed optimizer (ZeRO-1, arXiv 1910.02054).
        master_weights: keep fp32 copies of 16-bit parameters.
        max_skipped_steps: steps in a row with a loss or gradient that is not finite, after which
            `step` ends the run.

    Attributes:
        steps: how many there were, those that were left out included.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        buffers: GradientBuffers,
        context: ParallelContext,
        names: Mapping[Tensor, str],
        *,
        sharded: bool,
        master_weights: bool,
        max_skipped_steps: int,
    ) -> None:
        self._inner = optimizer
        self._context = context
        self._has_masters = master_weights
        self._sharded = sharded
        config = OptimizerConfig(
            bf16=master_weights,
            use_distributed_optimizer=sharded,
            # Clipping is done here: Megatron's reads the norm on the host in every step.
            clip_grad=0.0,
        )
        for group in optimizer.param_groups:
            # Megatron's sharded optimizer asks every group; expert parallelism will say True.
            group.setdefault("is_expert_parallel", False)
        groups = [
            [names.get(p, f"parameter {i} of group {g}") for i, p in enumerate(group["params"])]
            for g, group in enumerate(optimizer.param_groups)
        ]
        with context.megatron():
            self._megatron = _wrap(optimizer, config, buffers, context, sharded, master_weights)
        self._parts = _parts(self._megatron, names) if sharded else {}
        self._names = Names(_stepped(self._megatron, names) if sharded else groups, groups)
        self._norm_group = context.groups.intra_dist_opt if sharded else context.groups.mp
        self._megatron.grad_stats_parallel_group = self._norm_group
        self._megatron.tp_group = context.groups.tp
        self._weights = StepsFollow(
            self._megatron, buffers, sharded=sharded, master_weights=master_weights
        )
        self._skipping = SkippingOptimizer(optimizer, context.device)
        self._megatron.optimizer = self._skipping
        tells = context.topology.rank == 0
        self._skipped = SkippedSteps(context.device, max_skipped_steps, tells=tells)
        self._norm: Tensor | None = None
        self._finite: Tensor | None = None
        self._loss: Tensor | None = None
        self._prepared = False
        self.steps = 0

    @property
    def parameters(self) -> list[Tensor]:
        """What the user's optimizer steps on this rank."""
        return [p for group in self._inner.param_groups for p in group["params"]]

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out because something was not finite, as far as is known.

        The host hears of a step right before the next one, and when a checkpoint is made.
        """
        return self._skipped.count

    def begin(self) -> None:
        """A step begins: what was known of the gradients counts no more."""
        self._norm = self._finite = self._loss = None
        self._prepared = False

    def saw(self, loss: Tensor) -> None:
        """Note this rank's loss of the step, a scalar: unless it is finite, `step` does nothing."""
        self._loss = loss.detach()

    def prepare(self) -> None:
        """Give every parameter its gradient from the buffers, unless it has it since `begin`."""
        if self._prepared:
            return
        self._prepared = True
        with self._context.megatron():
            self._megatron.prepare_grads()

    def grad_norm(self) -> Tensor:
        """2-norm of the gradient of the whole model, the same on every rank: a scalar in fp32.

        Parameters that tensor-parallel ranks hold in common count once. It is NaN if the loss of a
        rank is not finite. Not read on the host.
        """
        self.prepare()
        if self._norm is None:
            with self._context.megatron():
                grads = gradients_for_norm(self._megatron)
            square = torch.zeros((), dtype=torch.float32, device=self._context.device)
            if grads:
                square = torch.nn.utils.get_total_norm(grads).float().square()
            square = square + self._loss_unless_finite()
            if dist.is_initialized():
                dist.all_reduce(square, group=self._norm_group)
            self._norm = square.sqrt()
            if self._finite is None:
                self._finite = self._norm.isfinite()
        return self._norm

    def _loss_unless_finite(self) -> Tensor:
        """NaN if the loss that this rank or a replica of it has seen is not finite, or else 0."""
        if self._loss is None:
            return torch.zeros((), device=self._context.device)
        broken = self._loss.float() * 0
        if not self._sharded and self._context.topology.replicas > 1 and dist.is_initialized():
            # Gradients of replicas are added up, but not all that spoils a loss spoils them.
            dist.all_reduce(broken, group=self._context.groups.dp_cp)
        return broken

    def clip_by_norm(self, limit: float) -> None:
        """Scale all gradients so that `grad_norm` is at most `limit`."""
        norm = self.grad_norm()
        torch.nn.utils.clip_grads_with_norm_(self.parameters, limit, norm)
        self._norm = torch.clamp(norm, max=limit)

    def clip_by_value(self, limit: float) -> None:
        """Clamp every element of every gradient to `[-limit, limit]`."""
        self.grad_norm()  # what is not finite would be afterwards
        torch.nn.utils.clip_grad_value_(self.parameters, limit)
        self._norm = None

    def step(self) -> None:
        """Step, and bring the model's parameters up to date on every rank.

        It goes on from the model's weights as they are, whatever has changed them since the last.
        If the loss or the gradient of any rank is not finite, all ranks leave the step out: neither
        weights nor state change, as if the batch had not been there. The host waits for nothing.

        Raises:
            FloatingPointError: on all ranks, when too many steps in a row were left out.
        """
        if self._finite is None:
            self.grad_norm()
        self.settle()
        self._skipped.check()
        if not self._context.emulated:  # where numbers mean nothing
            self._skipping.finite = self._finite
        with self._context.megatron(), torch.no_grad():
            self._weights.take_changes()
            self._megatron.step_with_ready_grads()
        for parameter in self.parameters:
            # The gradient of an fp32 parameter is Megatron's buffer itself: let go of it, or the
            # next zero_grad could clear what the next step has put there.
            parameter.grad = None
        if self._skipping.finite is not None:
            self._skipped.send(self._skipping.finite, self.steps)
        self.steps += 1

    def settle(self) -> None:
        """Hear whether the last step was left out, and take back what the host counted of it.

        It waits for that step, so it is for the next one and for where the host waits anyway.
        """
        if self._skipped.hear():
            self._skipping.was_skipped()

    def reload(self) -> None:
        """Take the model's parameters as they are now, after they were loaded, and no low bits."""
        with self._context.megatron(), torch.no_grad():
            self._weights.take_changes()
            self._megatron.reload_model_params()

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the form of `state_dict`, besides sizes and precision."""
        return {"optimizer": type(self._inner).__name__, "distributed_optimizer": self._sharded}

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, by the names of parameters; see `optimizer_state`."""
        self.settle()
        with torch.no_grad():
            self._weights.take_changes()
        masters = [p.detach() for p in self.parameters] if self._has_masters else []
        return {
            **named(self._inner.state_dict(), self._names),
            "master_weights": dict(
                zip(chain.from_iterable(self._names.own), masters, strict=False)
            ),
            "parts": self._parts,
        }

    def load_state_dict(
        self, state: Mapping[str, Any], resume_settings: str = "checkpoint"
    ) -> Restored:
        """Restore what `state_dict` returned on the same rank of the same topology.

        Args:
            state: as it was saved, also by version 0.1.
            resume_settings: whose settings win, `checkpoint` or `arguments`.

        Raises:
            ValueError: a parameter or a group is not in both.
        """
        self.settle()
        saved = from_numbers(state, self._names) if "optimizer" in state else state
        if saved.get("parts", self._parts) != self._parts:
            raise ValueError(
                "the checkpoint's optimizer has other parts of the parameters on this rank: use the"
                " bucket_size and the number of ranks that it was saved with"
            )
        restored = restore(self._inner, saved, self._names, resume_settings)
        if self._has_masters:
            masters = saved["master_weights"]
            for name, parameter in zip(
                chain.from_iterable(self._names.own), self.parameters, strict=True
            ):
                parameter.data.copy_(masters[name])
        return restored


def _wrap(
    optimizer: Optimizer,
    config: OptimizerConfig,
    buffers: GradientBuffers,
    context: ParallelContext,
    sharded: bool,
    master_weights: bool,
) -> MegatronOptimizer:
    if sharded:
        topology = context.topology
        return DistributedOptimizer(
            optimizer,
            config,
            grad_scaler=None,
            init_state_fn=None,
            model_chunks=[buffers.ddp],
            per_model_buffers={0: buffers.ddp.buffers},
            data_parallel_group=context.groups.dp_cp,
            data_parallel_group_gloo=None,
            data_parallel_group_idx=topology.tp_rank + topology.pp_rank * topology.tp_size,
            distributed_optimizer_instance_id=0,
        )
    if master_weights:
        return Float16OptimizerWithFloat16Params(optimizer, config, None, None)
    return FP32Optimizer(optimizer, config, None)


def _stepped(megatron: DistributedOptimizer, names: Mapping[Tensor, str]) -> list[list[str]]:
    """Names of what the sharded optimizer steps on this rank: of each group those in fp32 first."""
    both = zip(megatron.model_fp32_groups, megatron.model_float16_groups, strict=True)
    return [[names[p] for p in (*fp32, *half)] for fp32, half in both]


def _parts(megatron: DistributedOptimizer, names: Mapping[Tensor, str]) -> dict[str, list[int]]:
    """The first element of each parameter that this rank steps, and the end of its part."""
    ranges = {p: megatron._get_model_param_range_map(p) for p in megatron.model_param_gbuf_map}
    return {names[p]: [own["param"].start, own["param"].end] for p, own in ranges.items()}
