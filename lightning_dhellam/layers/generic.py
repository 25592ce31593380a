"""A user's own module as one operator in each direction, under autograd.

For blocks that no lowering knows: they join the strands, but nothing inside them is scheduled. A
block gets whole sequences, which every tensor-parallel rank computes alike, unless it declares that
it works token by token (`sequence`):

    forward   gather  module            backward  gather  module.grad
    forward           module            backward          module.grad        token by token

Each rank keeps the tokens of the output, and of the gradient by the input, that are its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from lightning_dhellam.kernels import dropout
from lightning_dhellam.layers.rules import on_tp
from lightning_dhellam.layers.sequence import (
    check_parallel_layers,
    is_token_wise,
    of_whole_sequences,
)
from lightning_dhellam.layers.writer import GraphWriter, Sizes, main_grad
from lightning_dhellam.parallel.replicas import is_split
from lightning_dhellam.plan import Graph, GraphPair, Strand
from lightning_dhellam.plan.layout import CHANNELS, Held, Rule


def lower_module(module: Module, sizes: Sizes, index: int) -> GraphPair:
    """Lower a module that maps hidden states [S, B, H] to the same shape, or [S / TP, B, H].

    Its random numbers are seeded by the counters of step, micro-batch and layer, so plans do not
    change them. What autograd keeps for backward is one slot, whose size is not predicted.

    Raises:
        ValueError: a parameter has another type than the hidden states, or the module cannot work
            on a rank's own tokens though it declares that it does, or does not where it must.
    """
    _check_dtype(module, sizes.dtype, index)
    block = _Block(module, sizes, index)
    if sizes.context.topology.cp_size > 1 and not is_token_wise(module):
        raise ValueError(
            f"layer {index}, a {type(module).__name__}, is given whole sequences, but with"
            f" context_parallel_size={sizes.context.topology.cp_size} no rank has one: set"
            " token_wise = True on its class if it works token by token, or leave"
            " context_parallel_size at 1"
        )
    if not block.whole and sizes.tp > 1:
        check_parallel_layers(module, index)
    return GraphPair(block.forward(), block.backward())


@dataclass(frozen=True)
class _Block:
    module: Module
    sizes: Sizes
    index: int

    @property
    def whole(self) -> bool:
        """Whether it is given other ranks' tokens too."""
        return self.sizes.tp > 1 and not is_token_wise(self.module)

    @property
    def trained(self) -> tuple[Parameter, ...]:
        """The parameters that are not frozen."""
        return tuple(p for p in self.module.parameters() if p.requires_grad)

    def forward(self) -> Graph:
        w, sizes = self._writer(Strand.FORWARD), self.sizes
        read = w.gather("module.gather", "x", "x_full", sizes.hidden) if self.whole else "x"
        key = "batch.whole_key" if self.whole else "batch.key"

        def run(x: Tensor, key: int | None) -> tuple[Tensor, Any]:
            seed = None if key is None else dropout.derive_key(key, self.index)
            with torch.enable_grad(), _seeded(x.device, seed), self._entered():
                leaf = x.detach().requires_grad_()
                y = self.module(leaf)
            self._check_shape(leaf, y)
            return self._own(y.detach()), (leaf, y)

        w.compute(
            "module",
            (read, key),
            {"y": sizes.shard, "autograd": 0.0},
            run,
            moved=8 * self._size,
            records=("autograd",),
            rule=replace(self._rule((Held.SEQUENCE, self._held)), draws=key),
        )
        return w.graph({"x": sizes.shard}, ("y",))

    def backward(self) -> Graph:
        w, sizes, trained = self._writer(Strand.BACKWARD), self.sizes, self.trained
        grad = w.gather("module.grad_gather", "dy", "dy_full", sizes.hidden) if self.whole else "dy"

        def run(dy: Tensor, graph: Any) -> Tensor:
            leaf, y = graph
            # The slot of the graph goes after its last reader; a profile reads it again and again.
            with self._entered():
                dx, *grads = torch.autograd.grad(
                    y, [leaf, *trained], dy, allow_unused=True, retain_graph=True
                )
            for parameter, grad in zip(trained, grads, strict=True):
                total = main_grad(parameter)  # which clears it, even with nothing to add
                if grad is not None:
                    total.add_(grad, alpha=self._share(parameter))
            return self._own(torch.zeros_like(leaf) if dx is None else dx)

        w.compute(
            "module.grad",
            (grad, "autograd"),
            {"dx": sizes.shard},
            run,
            moved=16 * self._size,
            accumulates=trained,
            rule=self._rule(
                Held.SEQUENCE, tuple(Held.PARTS if is_split(p) else Held.PARTIAL for p in trained)
            ),
        )
        return w.graph({"dy": sizes.shard}, ("dx",))

    def _writer(self, direction: Strand) -> GraphWriter:
        return GraphWriter(type(self.module).__name__, direction, self.sizes)

    @property
    def _size(self) -> float:
        return self.sizes.whole if self.whole else self.sizes.shard

    @property
    def _held(self) -> Held:
        """What it is given of the sequence."""
        return Held.REPLICATED if self.whole else Held.SEQUENCE

    def _rule(
        self, writes: Held | tuple[Held, ...], gradient: tuple[Held, ...] | None = None
    ) -> Rule:
        mixes = CHANNELS | {Held.SEQUENCE} if self.whole else CHANNELS
        return replace(on_tp(self._held, writes, gradient), mixes=mixes)

    def _share(self, parameter: Parameter) -> float:
        """Which part of a gradient this rank adds, given that all ranks' are added up.

        Of the whole sequence every rank has the same gradient. Their mean is that again, and is
        equal on all ranks even where a kernel adds up in an order of its own each time.
        """
        return 1 / self.sizes.tp if self.whole and not is_split(parameter) else 1.0

    def _own(self, hidden: Tensor) -> Tensor:
        """This rank's tokens of what was computed of all."""
        if self.whole:
            length = hidden.shape[0] // self.sizes.tp
            hidden = hidden.narrow(0, self.sizes.context.topology.tp_rank * length, length)
        return hidden.contiguous()

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """What Megatron's layers inside need."""
        with ExitStack() as stack:
            stack.enter_context(self.sizes.context.megatron())
            if self.whole:
                stack.enter_context(of_whole_sequences(self.module))
            yield

    def _check_shape(self, x: Tensor, y: Any) -> None:
        if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
            found = f"{tuple(y.shape)} in {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
            raise ValueError(
                f"layer {self.index}, a {type(self.module).__name__}, made {found} of hidden states"
                f" {tuple(x.shape)} in {x.dtype}: a block must return hidden states of that shape"
                " and type"
            )


def _check_dtype(module: Module, dtype: torch.dtype, index: int) -> None:
    """Nothing is cast on the way and there is no autocast, so autograd would fail inside."""
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != dtype:
            raise ValueError(
                f"layer {index}, a {type(module).__name__}, has parameter '{name}' in"
                f" {parameter.dtype}, but hidden states are in {dtype} in this run: build it in the"
                " dtype that build_model(context, dtype) is given"
            )


@contextmanager
def _seeded(device: torch.device, key: int | None) -> Iterator[None]:
    """Random numbers from `key`, and the generators' states as they were afterwards."""
    if key is None:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(key)
        yield
