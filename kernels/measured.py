"""Activations that say how large what they make is, which a cast to 8 bits asks for next."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


def measured(
    forward: Callable[[Tensor], Tensor],
    backward: Callable[[Tensor, Tensor], Tensor],
    largest: Callable[[Tensor], Tensor],
) -> tuple[
    Callable[[Tensor], tuple[Tensor, Tensor]], Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
]:
    """Both functions with what `largest` says of the result, in a pass of its own."""

    def forward_measured(x: Tensor) -> tuple[Tensor, Tensor]:
        y = forward(x)
        return y, largest(y)

    def backward_measured(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        dx = backward(dy, x)
        return dx, largest(dx)

    return forward_measured, backward_measured
