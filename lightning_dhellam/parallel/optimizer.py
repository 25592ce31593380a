"""Megatron-core's optimizers around the user's own torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import OptimizerConfig
from torch import Tensor
from torch.optim import Optimizer

from lightning_dhellam.parallel.collectives import of_all_ranks
from lightning_dhellam.parallel.context import ParallelContext
from lightning_dhellam.parallel.experts import is_expert
from lightning_dhellam.parallel.gradients import GradientBuffers
from lightning_dhellam.parallel.loss_scale import LossScale
from lightning_dhellam.parallel.masters import StepsFollow
from lightning_dhellam.parallel.optimizer_state import (
    UNNAMED,
    Form,
    Names,
    Restored,
    from_numbers,
    named,
    restore,
)
from lightning_dhellam.parallel.regroup import State, put_back, requiring_gradients, whole_state
from lightning_dhellam.parallel.replicas import counts_here
from lightning_dhellam.parallel.skipping import SkippedSteps, SkippingOptimizer, prefer_fused
from lightning_dhellam.parallel.wrapping import parts, stepped, weights_of, wrap

_LOSS_SCALE = "loss_scale"
"""What the scale of the loss is called beside the state of the user's optimizer."""


class ModelParallelOptimizer:
    """Steps the user's optimizer on Megatron's gradient buffers.

    The user's optimizer has the state of what it really steps: fp32 master weights for a 16-bit
    model, and with `sharded` only this rank's part of them. From `prepare` to the end of `step` its
    groups hold those, with their gradients, and the model's parameters at all other times.

    Args:
        optimizer: the user's, as `configure_optimizers` returned it.
        buffers: of the gradients.
        context: groups of this rank.
        names: of the parameters.
        sharded: Megatron's distributed optimizer (ZeRO-1, arXiv 1910.02054).
        master_weights: keep fp32 copies of 16-bit parameters.
        max_skipped_steps: steps in a row with a loss or gradient that is not finite, after which
            `step` ends the run.
        loss_scale: what the loss is multiplied by before backward; None where it is not.

    Attributes:
        loss_scale: as it was given.
        steps: how many there were, those that were left out included.
        watchers: are called at the beginning of every step, with a scalar that says whether it is
            finite.
        followers: are called at the end of every step, with a scalar that says whether it was not
            left out, or None where that is not known.
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
        loss_scale: LossScale | None = None,
    ) -> None:
        prefer_fused(optimizer, context.device)
        self._inner = optimizer
        self._context = context
        self._parameter_names = names
        self._has_masters = master_weights
        self._sharded = sharded
        self._members: list[list[Tensor]] = [list(g["params"]) for g in optimizer.param_groups]
        tells = context.topology.rank == 0
        self._skipped = SkippedSteps(context.device, max_skipped_steps, tells=tells)
        self.loss_scale = loss_scale
        self._norm: Tensor | None = None
        self._finite: Tensor | None = None
        self._loss: Tensor | None = None
        self._prepared = False
        self._hidden: list[Tensor] = []
        self._shown: list[list[Tensor]] | None = None
        self.steps = 0
        self.watchers: list[Callable[[Tensor], None]] = []
        self.followers: list[Callable[[Tensor | None], None]] = []
        self._hold(buffers)

    def _hold(self, buffers: GradientBuffers) -> None:
        """Step the parameters that have a buffer. All others of the user's groups rest."""
        optimizer, context, names = self._inner, self._context, self._parameter_names
        held = set(map(id, buffers.ddp.params_with_grad))
        groups = [
            [names.get(p, f"{UNNAMED}{i} of group {g}") for i, p in enumerate(members)]
            for g, members in enumerate(self._members)
        ]
        own = []
        for group, members, of_group in zip(
            optimizer.param_groups, self._members, groups, strict=True
        ):
            # Megatron's sharded optimizer asks every group. One optimizer steps experts as well.
            group.setdefault("is_expert_parallel", False)
            group["params"] = [p for p in members if id(p) in held]
            both = zip(members, of_group, strict=True)
            own.append([name for p, name in both if id(p) in held])
        config = OptimizerConfig(
            bf16=self._has_masters,
            use_distributed_optimizer=self._sharded,
            # Clipping is done here: Megatron's reads the norm on the host in every step.
            clip_grad=0.0,
        )
        with context.megatron():
            self._megatron = wrap(
                optimizer, config, buffers, context, self._sharded, self._has_masters
            )
        self._buffers = buffers
        self._parts = parts(self._megatron, names) if self._sharded else {}
        self._names = Names(stepped(self._megatron, names) if self._sharded else own, groups)
        self._models = weights_of(self._megatron)
        self._own = [group["params"] for group in optimizer.param_groups]
        for group, members in zip(optimizer.param_groups, self._members, strict=True):
            group["params"] = list(members)
        self._weights = StepsFollow(
            self._megatron, buffers, sharded=self._sharded, master_weights=self._has_masters
        )
        self._skipping = SkippingOptimizer(optimizer, context.device)
        self._megatron.optimizer = self._skipping

    @property
    def inner(self) -> Optimizer:
        """The user's own."""
        return self._inner

    @property
    def parameters(self) -> list[Tensor]:
        """What the user's optimizer steps on this rank."""
        return [p for group in self._own for p in group]

    def _show_stepped(self) -> None:
        """Let the user's optimizer hold what it steps, as it must for a step and in its hooks."""
        if self._shown is None:
            self._shown = [group["params"] for group in self._inner.param_groups]
            for group, own in zip(self._inner.param_groups, self._own, strict=False):
                group["params"] = own

    def _show_model(self) -> None:
        """Let the user's optimizer hold the model's parameters, which the user has given to it."""
        if self._shown is not None:
            for group, shown in zip(self._inner.param_groups, self._shown, strict=True):
                group["params"] = shown
            self._shown = None

    @contextmanager
    def _showing_stepped(self) -> Iterator[None]:
        before = self._shown is None
        self._show_stepped()
        try:
            yield
        finally:
            if before:
                self._show_model()

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out because something was not finite, as far as is known.

        The host hears of a step right before the next one, and when a checkpoint is made.
        """
        return self._skipped.count

    def begin(self) -> None:
        """A step begins: what was known of the gradients counts no more."""
        self._show_model()
        self._norm = self._finite = self._loss = None
        self._prepared = False
        self._hidden = [own for own, model in self._models if not model.requires_grad]

    def saw(self, loss: Tensor) -> None:
        """Note this rank's loss of the step, a scalar: unless it is finite, `step` does nothing."""
        self._loss = loss.detach()

    def prepare(self) -> None:
        """Give every parameter its gradient from the buffers, unless it has it since `begin`."""
        if self._prepared:
            return
        self._prepared = True
        self._show_stepped()
        with self._context.megatron():
            self._megatron.prepare_grads()
        if self.loss_scale is not None:
            grads = [own.grad for own, _ in self._models if own.grad is not None]
            self.loss_scale.unscale_(grads)
        for parameter in self._hidden:  # frozen: no decay either, and no momentum
            parameter.grad = None

    def grad_norm(self) -> Tensor:
        """2-norm of the gradient of the whole model, the same on every rank: a scalar in fp32.

        What several ranks hold counts once. It is NaN if the loss of a rank is not finite. Not read
        on the host.
        """
        self.prepare()
        if self._norm is None:
            topology = self._context.topology
            grads = [
                own.grad
                for own, model in self._models
                if own.grad is not None and counts_here(model, topology, in_parts=self._sharded)
            ]
            square = torch.zeros((), dtype=torch.float32, device=self._context.device)
            if grads:
                # In the type of the gradients torch would round it, and of bf16 keep two digits.
                norms = torch._foreach_norm(grads, 2, dtype=torch.float32)
                square = torch.linalg.vector_norm(torch.stack(norms)).square()
            if self._loss is not None:
                square = square + self._loss.float() * 0  # NaN unless it is finite
            if dist.is_initialized():
                dist.all_reduce(square, group=self._context.groups.intra_dist_opt)
            self._norm = square.sqrt()
            if self._finite is None:
                self._finite = self._norm.isfinite()
        return self._norm

    def infinite_gradients(self) -> list[str]:
        """Names of the parameters whose gradient is not finite on this rank. The host waits."""
        self.prepare()
        return [
            self._parameter_names[model]
            for own, model in self._models
            if own.grad is not None and not bool(own.grad.isfinite().all())
        ]

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
        assert self._finite is not None
        self.settle()
        for watch in self.watchers:
            watch(self._finite)
        self._skipped.check()
        if not self._context.emulated:  # where numbers mean nothing
            self._skipping.finite = self._finite
        with self._context.megatron(), torch.no_grad():
            self._weights.take_changes()
            self._megatron.step_with_ready_grads()
            for follow in self.followers:
                follow(self._skipping.finite)
        for parameter in self.parameters:
            # The gradient of an fp32 parameter is Megatron's buffer itself: let go of it, or the
            # next zero_grad could clear what the next step has put there.
            parameter.grad = None
        self._show_model()
        finite, scale = self._skipping.finite, self.loss_scale
        if finite is not None:
            if scale is not None:
                scale.update(finite)
            self._skipped.send(finite, self.steps, None if scale is None else scale.value)
        self.steps += 1

    def settle(self) -> None:
        """Hear whether the last step was left out, and take back what the host counted of it.

        It waits for that step, so it is for the next one and for where the host waits anyway.
        """
        if self._skipped.hear():
            self._skipping.was_skipped()

    @property
    def has_others(self) -> bool:
        """Whether the user's optimizer was given parameters since, as by `add_param_group`."""
        groups = self._shown or [group["params"] for group in self._inner.param_groups]
        return [[*map(id, group)] for group in groups] != [[*map(id, m)] for m in self._members]

    def follow(self, make_buffers: Callable[[], GradientBuffers]) -> None:
        """Step what requires a gradient by now, and nothing else, from the next step on.

        What was stepped before keeps its buffer and its state, as in torch. All ranks of a stage
        must call this, between steps.

        Args:
            make_buffers: replaces the buffers by those of what requires a gradient just then.

        Raises:
            ValueError: the user's optimizer does not have a parameter that requires a gradient.
        """
        self._show_model()
        groups = [list(group["params"]) for group in self._inner.param_groups]
        members = {id(p) for of_group in groups for p in of_group}
        held = {id(p) for p in self._buffers.ddp.params_with_grad}
        trained = {n: id(p) for p, n in self._parameter_names.items() if p.requires_grad}
        lacking = [name for name, one in trained.items() if one not in members]
        new = self.has_others or not held.issuperset(trained.values())
        # Ranks that share experts train different ones.
        of_stage = of_all_ranks((lacking[:1], new), self._context.stage_group)
        for name in chain.from_iterable(names for names, _ in of_stage):
            raise ValueError(
                f"'{name}' requires a gradient since the last step, but the optimizer does not"
                " have it: give it to configure_optimizers, or to optimizer.add_param_group"
            )
        if not any(is_new for _, is_new in of_stage):
            self._buffers.expect_others()
            return
        self._regroup(groups, make_buffers)

    def _by_name(self) -> dict[str, Any]:
        stepped = list(zip(chain.from_iterable(self._names.own), self.parameters, strict=True))
        state = self._inner.state
        return {
            "state": {name: state[p] for name, p in stepped if p in state},
            "master_weights": {n: p.detach() for n, p in stepped} if self._has_masters else {},
            "parts": self._parts,
        }

    def _whole_state(self) -> State:
        """The whole state of every parameter, from all ranks that hold it."""
        saved, ranks = self._by_name(), self._context.groups
        whole: State = {}
        for of_experts, group in ((False, ranks.dp_cp), (True, ranks.expt_dp)):
            named = self._parameter_names.items()
            shapes = {name: p.shape for p, name in named if is_expert(p) is of_experts}
            whole |= whole_state(saved, shapes, group if self._sharded else None)
        return whole

    def _regroup(
        self, groups: list[list[Tensor]], make_buffers: Callable[[], GradientBuffers]
    ) -> None:
        self.settle()
        with torch.no_grad():
            self._weights.take_changes()
            state = self._whole_state()
        self._inner.state.clear()
        self._members = groups
        with requiring_gradients(self._buffers.ddp.params_with_grad):
            self._hold(make_buffers())
        names = chain.from_iterable(self._names.own)
        with torch.no_grad():
            put_back(self._inner, [*zip(names, self.parameters, strict=True)], state, self._parts)

    def reload(self) -> None:
        """Take the model's parameters as they are now, after they were loaded, and no low bits."""
        with self._showing_stepped(), self._context.megatron(), torch.no_grad():
            self._weights.take_changes()
            self._megatron.reload_model_params()

    @property
    def form(self) -> Form:
        """What of a state `load_state_dict` takes on this rank."""
        held = self._buffers.ddp.params_with_grad
        return Form(
            stepped=[*chain.from_iterable(self._names.own)],
            trained={self._parameter_names[parameter] for parameter in held},
            parts=self._parts,
            masters=self._has_masters,
            groups=self._names.groups,
        )

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
        with self._showing_stepped():
            state = named(self._inner.state_dict(), self._names)
        if self.loss_scale is not None:
            state["other"][_LOSS_SCALE] = self.loss_scale.state_dict()
        return {
            **state,
            "master_weights": dict(
                zip(chain.from_iterable(self._names.own), masters, strict=False)
            ),
            "parts": self._parts,
        }

    def load_state_dict(
        self, state: Mapping[str, Any], resume_settings: str = "checkpoint"
    ) -> Restored:
        """Restore what `state_dict` returned on a rank that steps the same parts.

        Args:
            state: as it was saved, also by version 0.1.
            resume_settings: whose settings win, `checkpoint` or `arguments`.

        Raises:
            ValueError: a parameter or a group is not in both.
        """
        self.settle()
        saved = from_numbers(state, self._names) if "optimizer" in state else state
        other = {**saved["other"]}
        scale = other.pop(_LOSS_SCALE, None)
        saved = {**saved, "other": other}
        frozen = set(saved["state"]).difference(*self._names.own)
        if frozen:
            raise ValueError(
                f"the checkpoint has the optimizer's state of '{min(frozen)}', which has not been"
                " trained in this run: unfreeze what was trained by then, in on_fit_start or"
                " on_load_checkpoint, and freeze it again after that if need be"
            )
        if saved.get("parts", self._parts) != self._parts:
            raise ValueError(
                "the checkpoint's optimizer has other parts of the parameters on this rank: use the"
                " bucket_size and the number of ranks that it was saved with"
            )
        with self._showing_stepped():
            restored = restore(self._inner, saved, self._names, resume_settings)
        if scale is not None and self.loss_scale is not None:
            self.loss_scale.load_state_dict(scale)
        if self._has_masters:
            masters = saved["master_weights"]
            for name, parameter in zip(
                chain.from_iterable(self._names.own), self.parameters, strict=True
            ):
                if name in masters:  # it may have been frozen then
                    parameter.data.copy_(masters[name])
        return restored
