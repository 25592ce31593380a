"""Random tensors, and a comparison per tensor with float64 autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 5e-3}
"""Relative errors that rounding explains: a few units in the last place, and one of bf16."""


def drawn(shape: Sequence[int], dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Normal numbers of `dtype`, the same on every device."""
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


def strided(x: Tensor) -> Tensor:
    """The same numbers with other strides: every second element of a larger tensor."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, dtype=x.dtype, device=x.device)
    wide[..., ::2] = x
    return wide[..., ::2]


def truth(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], dy: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Value and gradients of `function` in float64, by autograd."""
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    y = function(*leaves)
    return y.detach(), torch.autograd.grad(y, leaves, dy.double())


def assert_close(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float
) -> None:
    """Relative error of every tensor, by norm; shapes and finiteness too."""
    assert actual.keys() == expected.keys()
    errors = {}
    for name, value in actual.items():
        assert value.shape == expected[name].shape, name
        difference = (value.double() - expected[name].double()).norm()
        errors[name] = (difference / expected[name].double().norm()).item()
    assert all(error <= tolerance for error in errors.values()), errors
