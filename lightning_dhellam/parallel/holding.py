"""What the user's optimizer holds: what it really steps, or the parameters it was given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

from megatron.core.optimizer import OptimizerConfig
from torch import Tensor
from torch.optim import Optimizer

from lightning_dhellam.parallel.context import ParallelContext
from lightning_dhellam.parallel.experts import is_expert
from lightning_dhellam.parallel.gradients import GradientBuffers
from lightning_dhellam.parallel.masters import StepsFollow
from lightning_dhellam.parallel.optimizer_state import UNNAMED, Form, Names
from lightning_dhellam.parallel.regroup import State, whole_state
from lightning_dhellam.parallel.skipping import SkippingOptimizer
from lightning_dhellam.parallel.wrapping import parts, stepped, weights_of, wrap


class Holding:
    """The user's optimizer, wrapped by Megatron's, and what its groups hold.

    In a step and its hooks they hold what is really stepped, fp32 master weights or this rank's
    parts, and at all other times the model's parameters.

    Args:
        optimizer: the user's, as `configure_optimizers` returned it.
        buffers: of the gradients.
        context: groups of this rank.
        names: of the parameters.
        sharded: Megatron's distributed optimizer.
        master_weights: keep fp32 copies of 16-bit parameters.

    Attributes:
        inner: the user's optimizer.
        context: groups of this rank.
        parameter_names: of the model's parameters.
        sharded: whether Megatron's distributed optimizer wraps it.
        has_masters: whether it steps fp32 copies of 16-bit parameters.
        megatron: what wraps it.
        skipping: what leaves a step out.
        buffers: of what is stepped.
        weights: what brings weights and masters together.
        models: pairs of what is stepped and the model's parameter that it is of.
        names: of what is stepped, and of the groups.
        parts: which part of each parameter is stepped on this rank, by name; empty where all is.
        members: what the user has put into each group.
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
    ) -> None:
        self.inner = optimizer
        self.members: list[list[Tensor]] = [list(g["params"]) for g in optimizer.param_groups]
        self.context = context
        self.parameter_names = names
        self.sharded = sharded
        self.has_masters = master_weights
        self._shown: list[list[Tensor]] | None = None
        self.take(buffers)

    def take(self, buffers: GradientBuffers) -> None:
        """Let it step the parameters that have a buffer. All others of the user's groups rest."""
        optimizer, context, names = self.inner, self.context, self.parameter_names
        held = set(map(id, buffers.ddp.params_with_grad))
        groups = [
            [names.get(p, f"{UNNAMED}{i} of group {g}") for i, p in enumerate(members)]
            for g, members in enumerate(self.members)
        ]
        own = []
        for group, members, of_group in zip(
            optimizer.param_groups, self.members, groups, strict=True
        ):
            # Megatron's sharded optimizer asks every group. One optimizer steps experts as well.
            group.setdefault("is_expert_parallel", False)
            group["params"] = [p for p in members if id(p) in held]
            both = zip(members, of_group, strict=True)
            own.append([name for p, name in both if id(p) in held])
        config = OptimizerConfig(
            bf16=self.has_masters,
            use_distributed_optimizer=self.sharded,
            # Clipping is done here: Megatron's reads the norm on the host in every step.
            clip_grad=0.0,
        )
        with context.megatron():
            self.megatron = wrap(
                optimizer, config, buffers, context, self.sharded, self.has_masters
            )
        self.buffers = buffers
        self.parts = parts(self.megatron, names) if self.sharded else {}
        self.names = Names(stepped(self.megatron, names) if self.sharded else own, groups)
        self.models = weights_of(self.megatron)
        self._own = [group["params"] for group in optimizer.param_groups]
        for group, members in zip(optimizer.param_groups, self.members, strict=True):
            group["params"] = list(members)
        self.weights = StepsFollow(
            self.megatron, buffers, sharded=self.sharded, master_weights=self.has_masters
        )
        self.skipping = SkippingOptimizer(optimizer, context.device)
        self.megatron.optimizer = self.skipping

    @property
    def parameters(self) -> list[Tensor]:
        """What the user's optimizer steps on this rank."""
        return [p for group in self._own for p in group]

    @property
    def stepped_names(self) -> list[str]:
        """The names of `parameters`, in their order."""
        return [*chain.from_iterable(self.names.own)]

    def show_stepped(self) -> None:
        """Let the user's optimizer hold what it steps, as it must for a step and in its hooks."""
        if self._shown is None:
            self._shown = [group["params"] for group in self.inner.param_groups]
            for group, own in zip(self.inner.param_groups, self._own, strict=False):
                group["params"] = own

    def show_model(self) -> None:
        """Let the user's optimizer hold the model's parameters, which the user has given to it."""
        if self._shown is not None:
            for group, shown in zip(self.inner.param_groups, self._shown, strict=True):
                group["params"] = shown
            self._shown = None

    @contextmanager
    def showing_stepped(self) -> Iterator[None]:
        """Inside, the user's optimizer holds what it steps."""
        before = self._shown is None
        self.show_stepped()
        try:
            yield
        finally:
            if before:
                self.show_model()

    @property
    def has_others(self) -> bool:
        """Whether the user's optimizer was given parameters since, as by `add_param_group`."""
        groups = self._shown or [group["params"] for group in self.inner.param_groups]
        return [[*map(id, group)] for group in groups] != [[*map(id, m)] for m in self.members]

    @property
    def form(self) -> Form:
        """What of a state `load_state_dict` takes on this rank."""
        held = self.buffers.ddp.params_with_grad
        return Form(
            stepped=self.stepped_names,
            trained={self.parameter_names[parameter] for parameter in held},
            parts=self.parts,
            masters=self.has_masters,
            groups=self.names.groups,
        )

    def _by_name(self) -> dict[str, Any]:
        stepped = list(zip(self.stepped_names, self.parameters, strict=True))
        state = self.inner.state
        return {
            "state": {name: state[p] for name, p in stepped if p in state},
            "master_weights": {n: p.detach() for n, p in stepped} if self.has_masters else {},
            "parts": self.parts,
        }

    def whole_state(self) -> State:
        """The whole state of every parameter, from all ranks that hold it."""
        saved, ranks = self._by_name(), self.context.groups
        whole: State = {}
        for of_experts, group in ((False, ranks.dp_cp), (True, ranks.expt_dp)):
            named = self.parameter_names.items()
            shapes = {name: p.shape for p, name in named if is_expert(p) is of_experts}
            whole |= whole_state(saved, shapes, group if self.sharded else None)
        return whole
