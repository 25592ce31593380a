"""Gradient buffers and their data-parallel reduction: Megatron-core's DDP, driven by operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.nn import Module, Parameter

from lightning_dhellam.parallel.collectives import Pending
from lightning_dhellam.parallel.context import ParallelContext
from lightning_dhellam.parallel.experts import is_expert
from lightning_dhellam.parallel.replicas import is_split, share_buffers, start_alike
from lightning_dhellam.plan import Collective
from lightning_dhellam.versions import reduce_scatter_single

OnLane = Callable[[], AbstractContextManager[None]]
"""Enters the `dp` lane, after everything that compute was given so far."""

_OLD = "main_grad_is_old"
_ALIGNED = 512
"""Bytes: no kernel asks for more."""


def start_over(parameter: Parameter) -> None:
    """Let what is next added to the gradient of `parameter` overwrite it."""
    setattr(parameter, _OLD, True)


def taken_first(parameter: Parameter) -> bool:
    """Whether the `main_grad` of `parameter` is asked for the first time in this step.

    Then it holds the last step's gradient, which the caller must overwrite.
    """
    return bool(parameter.__dict__.pop(_OLD, False))


@contextmanager
def aside(parameters: Iterable[Parameter]) -> Iterator[None]:
    """What is added to gradients of `parameters` inside is thrown away; they stay as they are."""
    own = {id(p): p for p in parameters if hasattr(p, "main_grad")}.values()
    kept = [(p, p.main_grad, p.__dict__.get(_OLD, False)) for p in own]
    try:
        if kept:
            _share_one_gradient([(p, grad) for p, grad, _ in kept])
        yield
    finally:
        for parameter, grad, old in kept:
            parameter.main_grad = grad
            setattr(parameter, _OLD, old)


def _share_one_gradient(gradients: Sequence[tuple[Parameter, Tensor]]) -> None:
    """All add to the same memory: only that they do is of interest, and how it is aligned."""
    size = max(grad.nbytes for _, grad in gradients) + _ALIGNED
    shared = torch.empty(size, dtype=torch.uint8, device=gradients[0][1].device)
    for parameter, grad in gradients:
        start = (grad.data_ptr() - shared.data_ptr()) % _ALIGNED
        part = shared[start : start + grad.nbytes].view(grad.dtype).view(grad.shape)
        parameter.main_grad = part  # type: ignore[attr-defined]
        setattr(parameter, _OLD, True)


class GradientBuffers:
    """Contiguous `main_grad` buffers of a model, reduced bucket by bucket as they fill up.

    The gradients of data-parallel and context-parallel ranks are added up: the weights of their
    tokens say what each is of the whole (`engine/weights.py`). Those of an expert are added up over
    the ranks that hold it, which have seen the tokens of all ranks that share it with others.

    Args:
        model: every parameter that requires a gradient gets a `main_grad`. What ranks hold alike
            becomes what the first of them holds.
        config: Megatron's TransformerConfig of the model.
        context: groups of this rank.
        sharded: reduce-scatter for the distributed optimizer, instead of all-reduce.
        fp32: buffers in fp32; otherwise in the type of the parameters.
        bucket_size: parameters per bucket; None for Megatron's default.
    """

    def __init__(
        self,
        model: Module,
        config: Any,
        context: ParallelContext,
        *,
        sharded: bool,
        fp32: bool,
        bucket_size: int | None = None,
    ) -> None:
        self._context = context
        self._model = model
        self._groups = _groups_of_stage(context)
        self._frozen: tuple[Parameter, ...] = ()
        start_alike(model, context)
        if context.topology.tp_size > 1:
            _mark_partial(model)
        self._parallel = any(map(self.is_reduced, model.parameters()))
        with context.megatron():
            self.ddp = DistributedDataParallel(
                _summing(config),
                DistributedDataParallelConfig(
                    grad_reduce_in_fp32=fp32,
                    overlap_grad_reduce=self._parallel,
                    use_distributed_optimizer=sharded,
                    bucket_size=bucket_size,
                ),
                model,
                pg_collection=self._groups,
            )
            if self._parallel and not context.planned:
                # Not first in a step: it loads kernels and connects (see `engine/rehearsal.py`).
                self.ddp.start_grad_sync()
                self.ddp.finish_grad_sync()

    def zero(self) -> None:
        """Begin a step: what the buffers hold counts no more.

        Nothing is cleared here. The first operator that adds to a gradient overwrites it
        (`taken_first`), which saves a pass over all gradients and most of a second one.
        """
        for parameter in self.ddp.params_with_grad:
            parameter.grad_added_to_main_grad = False
            start_over(parameter)
        self._frozen = tuple(p for p in self.ddp.params_with_grad if not p.requires_grad)
        for group in self._bucket_groups:
            group.reset()

    def expect_others(self) -> None:
        """Other parameters are frozen from the next step on."""
        for group in self._bucket_groups:
            # How often each gradient is completed is learned in a step, and holds no longer.
            group.is_first_batch = True
            group.golden_per_param_grad_ready_counts = {}

    @property
    def _bucket_groups(self) -> list[Any]:
        return list(self.ddp.bucket_groups + self.ddp.expert_parallel_bucket_groups)

    def ready(self, parameters: tuple[Parameter, ...], on_lane: OnLane) -> None:
        """Note that the gradients of `parameters` are complete.

        The last one of a bucket starts the bucket's reduction on the lane that `on_lane` enters.
        """
        if not self._parallel:
            return
        with on_lane(), self._context.megatron():
            # A bucket is reduced when all of it is complete. Nothing comes of what is frozen, and
            # copies of what other stages have are in none.
            for parameter in (*self._frozen, *parameters):
                if parameter in self.ddp.param_to_bucket_group:
                    self.ddp.param_to_bucket_group[parameter].register_grad_ready(parameter)
        self._frozen = ()

    def finish(self) -> None:
        """Wait for the reductions, and add up what tensor-parallel ranks hold in part.

        With sequence parallelism each rank has seen only its tokens, so the gradients of norm
        weights, and of every other weight that is not split, are partial sums. Buffers that the
        step has changed become those of the first rank.
        """
        self.ready((), nullcontext)  # on a stage where all is frozen nothing was ready
        for parameter in self.ddp.params_with_grad:
            if taken_first(parameter):  # nothing was added: it took no part in this step
                parameter.main_grad.zero_()
        if self._context.topology.stage_size == 1:
            return
        with self._context.megatron(), torch.no_grad():
            finalize_model_grads([self.ddp], pg_collection=self._groups)
            share_buffers(self._model, self._context)

    def is_reduced(self, parameter: Tensor) -> bool:
        """Whether the gradient of `parameter` is added up over several ranks."""
        topology = self._context.topology
        return (topology.expert_dp_size if is_expert(parameter) else topology.replicas) > 1

    @property
    def are_reduced(self) -> bool:
        """Whether there are gradients that are added up over several ranks."""
        return self._parallel

    @property
    def collective(self) -> Collective:
        """What reduces a bucket."""
        sharded = self.ddp.ddp_config.use_distributed_optimizer
        return Collective.REDUCE_SCATTER if sharded else Collective.ALL_REDUCE

    @property
    def largest_bucket(self) -> Tensor:
        """The gradients of the largest bucket that is reduced."""
        bucket, _ = self._largest
        return bucket

    @property
    def _largest(self) -> tuple[Tensor, dist.ProcessGroup]:
        """The largest bucket that is reduced, and the ranks over which it is."""
        buckets = [
            (bucket.grad_data, buffer.data_parallel_group)
            for buffer in (*self.ddp.buffers, *self.ddp.expert_parallel_buffers)
            if buffer.data_parallel_group.size() > 1
            for bucket in buffer.buckets
        ]
        return max(buckets, key=lambda of: of[0].numel())

    def reduce(self, bucket: Tensor) -> Pending:
        """Start to reduce `bucket`, as large as the largest, which is none of a step's."""
        _, group = self._largest
        wait = not bucket.is_cuda
        with self._context.megatron():
            if self.collective is Collective.ALL_REDUCE:
                return Pending(None, dist.all_reduce(bucket, group=group, async_op=wait))
            own = bucket.chunk(group.size())[group.rank()]
            return Pending(None, reduce_scatter_single(own, bucket, group=group, async_op=wait))

    def close(self) -> None:
        """Let go of the model: it has no `main_grad` any more, and ordinary training works again.

        Megatron's hooks would move what autograd computes into the buffers. They are in a cycle
        with the buffers that Python cannot see, so nothing else would ever free either.
        """
        self.ddp.grad_accs.clear()
        self.ddp.param_to_bucket_group.clear()  # so do hooks that something else keeps
        for parameter in self.ddp.params_with_grad:
            for name in ("main_grad", "grad_added_to_main_grad", _OLD):
                parameter.__dict__.pop(name, None)
        for buffer in self.ddp.buffers + self.ddp.expert_parallel_buffers:
            buffer.grad_data.untyped_storage().resize_(0)


def _summing(config: Any) -> Any:
    """The configuration, but that Megatron does not divide sums by the number of ranks.

    Nor does it move the biases of routers, by counts that no forward of its own has made.
    """
    config = copy(config)
    config.calculate_per_token_loss = True
    config.moe_router_enable_expert_bias = False
    return config


def _groups_of_stage(context: ParallelContext) -> ProcessGroupCollection:
    """Megatron's groups, as if this rank's pipeline stage were the only one.

    Its own pipeline would add up the embedding's gradients of the first and the last stage, which
    here are one, and would reduce the gradients of all stages but the first in a single bucket.
    """
    if context.topology.pp_size == 1:
        return context.groups
    groups = copy(context.groups)
    groups.pp = groups.embd = groups.pos_embd = context.alone
    return groups


def _mark_partial(model: Module) -> None:
    """Tell Megatron which gradients to add up over the tensor-parallel ranks.

    It marks its own norms when it makes them; a user's block comes unmarked, and the biases of
    experts come marked, though those of another rank are another expert's.
    """
    for parameter in model.parameters():
        partial = not is_split(parameter) and not is_expert(parameter)
        parameter.sequence_parallel = partial  # type: ignore[attr-defined]
