"""Megatron-core's optimizers around the user's own torch optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_dhellam.parallel.collectives import of_all_ranks
from lightning_dhellam.parallel.context import ParallelContext
from lightning_dhellam.parallel.gradients import GradientBuffers
from lightning_dhellam.parallel.holding import Holding
from lightning_dhellam.parallel.loss_scale import LossScale
from lightning_dhellam.parallel.optimizer_state import (
    Form,
    Restored,
    from_numbers,
    named,
    restore,
)
from lightning_dhellam.parallel.regroup import put_back, requiring_gradients
from lightning_dhellam.parallel.replicas import counts_here
from lightning_dhellam.parallel.skipping import SkippedSteps, prefer_fused

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
        self._held = Holding(
            optimizer,
            buffers,
            context,
            names,
            sharded=sharded,
            master_weights=master_weights,
        )
        tells = context.topology.rank == 0
        self._skipped = SkippedSteps(context.device, max_skipped_steps, tells=tells)
        self.loss_scale = loss_scale
        self._norm: Tensor | None = None
        self._finite: Tensor | None = None
        self._norms: dict[str, Tensor] = {}
        self._loss: Tensor | None = None
        self._prepared = False
        self._hidden: list[Tensor] = []
        self.steps = 0
        self.watchers: list[Callable[[Tensor], None]] = []
        self.followers: list[Callable[[Tensor | None], None]] = []

    @property
    def inner(self) -> Optimizer:
        """The user's own."""
        return self._held.inner

    @property
    def parameters(self) -> list[Tensor]:
        """What the user's optimizer steps on this rank."""
        return self._held.parameters

    @property
    def skipped_steps(self) -> int:
        """How many steps were left out because something was not finite, as far as is known.

        The host hears of a step right before the next one, and when a checkpoint is made.
        """
        return self._skipped.count

    def begin(self) -> None:
        """A step begins: what was known of the gradients counts no more."""
        self._held.show_model()
        self._norm = self._finite = self._loss = None
        self._norms = {}
        self._prepared = False
        self._hidden = [own for own, model in self._held.models if not model.requires_grad]

    def saw(self, loss: Tensor) -> None:
        """Note this rank's loss of the step, a scalar: unless it is finite, `step` does nothing."""
        self._loss = loss.detach()

    def prepare(self) -> None:
        """Give every parameter its gradient from the buffers, unless it has it since `begin`."""
        if self._prepared:
            return
        self._prepared = True
        self._held.show_stepped()
        with self._held.context.megatron():
            self._held.megatron.prepare_grads()
        if self.loss_scale is not None:
            grads = [own.grad for own, _ in self._held.models if own.grad is not None]
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
            topology = self._held.context.topology
            counting = [
                (self._held.parameter_names[model], own.grad)
                for own, model in self._held.models
                if own.grad is not None
                and counts_here(model, topology, in_parts=self._held.sharded)
            ]
            norms: Sequence[Tensor] = ()
            square = torch.zeros((), dtype=torch.float32, device=self._held.context.device)
            if counting:
                # In the type of the gradients torch would round it, and of bf16 keep two digits.
                grads = [grad for _, grad in counting]
                norms = torch._foreach_norm(grads, 2, dtype=torch.float32)
                square = torch.linalg.vector_norm(torch.stack(norms)).square()
            if self._loss is not None:
                square = square + self._loss.float() * 0  # NaN unless it is finite
            if dist.is_initialized():
                dist.all_reduce(square, group=self._held.context.groups.intra_dist_opt)
            self._norm = square.sqrt()
            if self._finite is None:
                self._finite = self._norm.isfinite()
                self._norms = {name: n for (name, _), n in zip(counting, norms, strict=True)}
        return self._norm

    def infinite_gradients(self) -> list[str]:
        """Names of the parameters whose gradient has made `grad_norm` so, of those on this rank.

        They are those that it found before anything was clipped, which makes all gradients NaN or
        none infinite. The host waits.
        """
        return [name for name, norm in self._norms.items() if not bool(norm.isfinite())]

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
        if not self._held.context.emulated:  # where numbers mean nothing
            self._held.skipping.finite = self._finite
        with self._held.context.megatron(), torch.no_grad():
            self._held.weights.take_changes()
            self._held.megatron.step_with_ready_grads()
            for follow in self.followers:
                follow(self._held.skipping.finite)
        for parameter in self.parameters:
            # The gradient of an fp32 parameter is Megatron's buffer itself: let go of it, or the
            # next zero_grad could clear what the next step has put there.
            parameter.grad = None
        self._held.show_model()
        finite, scale = self._held.skipping.finite, self.loss_scale
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
            self._held.skipping.was_skipped()

    def follow(self, make_buffers: Callable[[], GradientBuffers]) -> None:
        """Step what requires a gradient by now, and nothing else, from the next step on.

        What was stepped before keeps its buffer and its state, as in torch. All ranks of a stage
        must call this, between steps.

        Args:
            make_buffers: replaces the buffers by those of what requires a gradient just then.

        Raises:
            ValueError: the user's optimizer does not have a parameter that requires a gradient.
        """
        self._held.show_model()
        groups = [list(group["params"]) for group in self._held.inner.param_groups]
        members = {id(p) for of_group in groups for p in of_group}
        held = {id(p) for p in self._held.buffers.ddp.params_with_grad}
        trained = {n: id(p) for p, n in self._held.parameter_names.items() if p.requires_grad}
        lacking = [name for name, one in trained.items() if one not in members]
        new = self._held.has_others or not held.issuperset(trained.values())
        # Ranks that share experts train different ones.
        of_stage = of_all_ranks((lacking[:1], new), self._held.context.stage_group)
        for name in chain.from_iterable(names for names, _ in of_stage):
            raise ValueError(
                f"'{name}' requires a gradient since the last step, but the optimizer does not"
                " have it: give it to configure_optimizers, or to optimizer.add_param_group"
            )
        if not any(is_new for _, is_new in of_stage):
            self._held.buffers.expect_others()
            return
        self._regroup(groups, make_buffers)

    def _regroup(
        self, groups: list[list[Tensor]], make_buffers: Callable[[], GradientBuffers]
    ) -> None:
        held = self._held
        self.settle()
        with torch.no_grad():
            held.weights.take_changes()
            state = held.whole_state()
        held.inner.state.clear()
        held.members = groups
        with requiring_gradients(held.buffers.ddp.params_with_grad):
            held.take(make_buffers())
        stepped = [*zip(held.stepped_names, held.parameters, strict=True)]
        with torch.no_grad():
            put_back(held.inner, stepped, state, held.parts)

    def reload(self) -> None:
        """Take the model's parameters as they are now, after they were loaded, and no low bits."""
        with self._held.showing_stepped(), self._held.context.megatron(), torch.no_grad():
            self._held.weights.take_changes()
            self._held.megatron.reload_model_params()

    @property
    def has_others(self) -> bool:
        """Whether the user's optimizer was given parameters since, as by `add_param_group`."""
        return self._held.has_others

    @property
    def form(self) -> Form:
        """What of a state `load_state_dict` takes on this rank."""
        return self._held.form

    @property
    def settings(self) -> dict[str, Any]:
        """What decides the form of `state_dict`, besides sizes and precision."""
        return {
            "optimizer": type(self._held.inner).__name__,
            "distributed_optimizer": self._held.sharded,
        }

    def state_dict(self, *, waits: bool = True) -> dict[str, Any]:
        """This rank's state, by the names of parameters; see `optimizer_state`.

        Args:
            waits: whether the host may wait to hear whether the last step was left out. Otherwise
                it does only if the state depends on that.
        """
        if waits or self.loss_scale is not None or self._held.skipping.has_counted:
            self.settle()
        with torch.no_grad():
            self._held.weights.take_changes()
        masters = [p.detach() for p in self.parameters] if self._held.has_masters else []
        with self._held.showing_stepped():
            state = named(self._held.inner.state_dict(), self._held.names)
        if self.loss_scale is not None:
            state["other"][_LOSS_SCALE] = self.loss_scale.state_dict()
        return {
            **state,
            "master_weights": dict(zip(self._held.stepped_names, masters, strict=False)),
            "parts": self._held.parts,
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
        saved = from_numbers(state, self._held.names) if "optimizer" in state else state
        other = {**saved["other"]}
        scale = other.pop(_LOSS_SCALE, None)
        saved = {**saved, "other": other}
        frozen = set(saved["state"]).difference(*self._held.names.own)
        if frozen:
            raise ValueError(
                f"the checkpoint has the optimizer's state of '{min(frozen)}', which has not been"
                " trained in this run: unfreeze what was trained by then, in on_fit_start or"
                " on_load_checkpoint, and freeze it again after that if need be"
            )
        if saved.get("parts", self._held.parts) != self._held.parts:
            raise ValueError(
                "the checkpoint's optimizer has other parts of the parameters on this rank: use the"
                " bucket_size and the number of ranks that it was saved with"
            )
        with self._held.showing_stepped():
            restored = restore(self._held.inner, saved, self._held.names, resume_settings)
        if scale is not None and self.loss_scale is not None:
            self.loss_scale.load_state_dict(scale)
        if self._held.has_masters:
            masters = saved["master_weights"]
            for name, parameter in zip(self._held.stepped_names, self.parameters, strict=True):
                if name in masters:  # it may have been frozen then
                    parameter.data.copy_(masters[name])
        return restored
