"""SwiGLU activation (Shazeer, arXiv 2002.05202)."""

from lightning_dhellam.kernels.swiglu.reference import (
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
