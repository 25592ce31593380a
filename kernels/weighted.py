"""An activation of rows that have weights of their own, from the activation alone."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Both = tuple[
    Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
]


def weighted(
    forward: Callable[[Tensor], Tensor], backward: Callable[[Tensor, Tensor], Tensor]
) -> Both:
    """Forward and backward of an activation times weights, by the activation's own of them."""

    def weighted_forward(x: Tensor, weights: Tensor) -> Tensor:
        """`forward` of `x` [N, F], each row times its weight [N]. Rounded once."""
        return (forward(x.float()) * weights[:, None].float()).to(x.dtype)

    def weighted_backward(dy: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of `weighted_forward` by `x` [N, F] and, in fp32, by `weights` [N]."""
        wide, grad = x.float(), dy.float()
        d_weights = (grad * forward(wide)).sum(1)
        return backward(grad * weights[:, None].float(), wide).to(x.dtype), d_weights

    return weighted_forward, weighted_backward
