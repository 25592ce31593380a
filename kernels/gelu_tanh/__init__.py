"""GELU as tanh approximates it (Hendrycks and Gimpel, arXiv 1606.08415): that of GPT-2."""

from lightning_dhellam.kernels.gelu_tanh.reference import (
    backward,
    backward_measured,
    forward,
    forward_measured,
    weighted_backward,
    weighted_forward,
)

__all__ = [
    "backward",
    "backward_measured",
    "forward",
    "forward_measured",
    "weighted_backward",
    "weighted_forward",
]
