"""GELU activation with the error function (Hendrycks and Gimpel, arXiv 1606.08415)."""

from lightning_dhellam.kernels.gelu.reference import (
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
