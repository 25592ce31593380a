"""Model states: weights, gradients and the optimizer of one rank, as Megatron-core allocates them.

Megatron's own buffers and optimizers are made, of tensors that have a shape and no memory: buckets,
padding, shards and masters are theirs.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.optim import Optimizer

from lightning_dhellam.models import CausalLM
from lightning_dhellam.parallel.gradients import GradientBuffers
from lightning_dhellam.parallel.optimizer import ModelParallelOptimizer

_PRIMES = (2, 3, 5, 7, 11, 13)
"""Sizes of a small parameter, by which those of what an optimizer keeps of it are told apart."""


@dataclass(frozen=True)
class ModelStates:
    """Bytes that stay from step to step (the word is that of arXiv 1910.02054).

    Attributes:
        weights: parameters, and buffers of modules.
        gradients: Megatron's buffers, padding included.
        optimizer: master weights and what the optimizer keeps of each.
    """

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.gradients + self.optimizer


def model_states(
    model: CausalLM, buffers: GradientBuffers, optimizer: ModelParallelOptimizer
) -> ModelStates:
    """Count the states of a model: planned, or of a run.

    Of a run after its first step the optimizer's state is counted as it is; before, and of what is
    planned, as its own rule makes it: of a small parameter, which it is let to step.

    Args:
        model: this rank's part.
        buffers: of its gradients.
        optimizer: of it.
    """
    counted: set[int] = set()
    copies: list[Any] = [] if model.tied_copy is None else [model.tied_copy]
    weights = bytes_of([*model.parameters(), *model.buffers(), *copies], counted)
    every = (*buffers.ddp.buffers, *buffers.ddp.expert_parallel_buffers)
    weights += bytes_of([b.param_data for b in every if b.param_data is not None], counted)
    of_copies = [copy.main_grad for copy in copies if copy.requires_grad]
    gradients = bytes_of([*(b.grad_data for b in every), *of_copies], counted)
    stepped = optimizer.parameters
    masters = bytes_of(stepped, counted)
    state = optimizer.inner.state
    if state:
        kept = bytes_of(tensors_in(state.values()), counted)
    else:
        kept = _state_bytes(optimizer.inner, stepped)
    return ModelStates(weights, gradients, masters + kept)


def bytes_of(every: Iterable[Tensor], counted: set[int] | None = None) -> int:
    """Bytes of the storages of tensors, each counted once, and none of those `counted` already."""
    counted = set() if counted is None else counted
    total = 0
    for tensor in every:
        storage = tensor.untyped_storage()
        if storage._cdata not in counted:
            counted.add(storage._cdata)
            total += storage.nbytes()
    return total


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among values, and in mappings among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from tensors_in(value.values())


def _state_bytes(optimizer: Optimizer, parameters: Iterable[Tensor]) -> int:
    """Bytes that an optimizer will keep of parameters that it has not stepped yet."""
    known: dict[tuple[int, torch.dtype], list[tuple[tuple[int, ...], int]]] = {}
    total = 0
    for parameter in parameters:
        kind = parameter.dim(), parameter.dtype
        if kind not in known:
            known[kind] = _kept_of(optimizer, *kind)
        sizes = dict(zip(_PRIMES, parameter.shape, strict=False))
        total += sum(prod(sizes.get(n, n) for n in shape) * size for shape, size in known[kind])
    return total


def _kept_of(
    optimizer: Optimizer, dimensions: int, dtype: torch.dtype
) -> list[tuple[tuple[int, ...], int]]:
    """Shape, and bytes of an element, of what is kept of a parameter with sizes of `_PRIMES`.

    One that cannot step a small parameter on the host is taken to keep two values of each element.
    """
    with unset_fake_temporarily():
        probe = torch.zeros(_PRIMES[:dimensions], dtype=dtype)
        probe.grad = torch.zeros_like(probe)
        other = alike(optimizer, [probe])
        try:
            with torch.no_grad():
                type(other).step(other)
        except Exception:  # it may need a GPU, or whole layers
            return [(tuple(probe.shape), probe.element_size())] * 2
        kept = tensors_in(other.state.values())
        return [(tuple(t.shape), t.element_size()) for t in kept]


def alike(optimizer: Optimizer, parameters: Sequence[Tensor]) -> Optimizer:
    """Make a second one with the settings of the first group, for other parameters.

    It has nothing of what hangs on the first.
    """
    other = object.__new__(type(optimizer))
    vars(other).update(vars(optimizer))
    vars(other).update({name: OrderedDict() for name in vars(other) if "hooks" in name})
    vars(other)["param_groups"] = [{**optimizer.param_groups[0], "params": [*parameters]}]
    vars(other)["state"] = defaultdict[Tensor, dict[str, Any]](dict)
    return other
