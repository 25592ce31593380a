"""SwiGLU activation (Shazeer, arXiv 2002.05202)."""

from lightning_dhellam.kernels.swiglu.reference import (
    backward,
    forward,
    weighted_backward,
    weighted_forward,
)

__all__ = ["backward", "forward", "weighted_backward", "weighted_forward"]
