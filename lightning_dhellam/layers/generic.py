"""A user's own module as one operator in each direction, under autograd.

For blocks that no lowering knows: they join the strands, but nothing inside them is scheduled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from lightning_dhellam.kernels import dropout
from lightning_dhellam.layers.writer import GraphWriter, Sizes, main_grad
from lightning_dhellam.plan import GraphPair, Strand


def lower_module(module: Module, sizes: Sizes, index: int) -> GraphPair:
    """Lower a module that maps hidden states [S / TP, B, H] to the same shape.

    Its random numbers are seeded by the counters of step, micro-batch and layer, so plans do not
    change them. What autograd keeps for backward is one slot, whose size is not predicted.

    Raises:
        ValueError: a parameter has another type than the hidden states.
    """
    _check_dtype(module, sizes.dtype, index)
    parameters = tuple(p for p in module.parameters() if p.requires_grad)
    for parameter in parameters:
        # Megatron's mark of a weight that every TP rank holds and uses on its own tokens only.
        parameter.sequence_parallel = sizes.tp > 1  # type: ignore[attr-defined]
    name = type(module).__name__
    forward = GraphWriter(name, Strand.FORWARD, sizes)

    def run(x: Tensor, key: int | None) -> tuple[Tensor, Any]:
        seed = None if key is None else dropout.derive_key(key, index)
        with torch.enable_grad(), _seeded(x.device, seed):
            leaf = x.detach().requires_grad_()
            y = module(leaf)
        return y.detach(), (leaf, y)

    forward.compute(
        "module",
        ("x", "batch.key"),
        {"y": sizes.shard, "autograd": 0.0},
        run,
        moved=8 * sizes.shard,
    )
    backward = GraphWriter(name, Strand.BACKWARD, sizes)

    def run_grad(dy: Tensor, graph: Any) -> Tensor:
        leaf, y = graph
        # The slot of the graph goes after its last reader; a profile reads it again and again.
        dx, *grads = torch.autograd.grad(
            y, [leaf, *parameters], dy, allow_unused=True, retain_graph=True
        )
        for parameter, grad in zip(parameters, grads, strict=True):
            total = main_grad(parameter)  # which clears it, even when there is nothing to add
            if grad is not None:
                total.add_(grad)
        return torch.zeros_like(dy) if dx is None else dx

    backward.compute(
        "module.grad",
        ("dy", "autograd"),
        {"dx": sizes.shard},
        run_grad,
        moved=16 * sizes.shard,
        accumulates=parameters,
    )
    return GraphPair(
        forward.graph({"x": sizes.shard}, ("y",)), backward.graph({"dy": sizes.shard}, ("dx",))
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
