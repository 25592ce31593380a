"""SwiGLU activation (Shazeer, arXiv 2002.05202)."""

from lightning_dhellam.kernels.swiglu.reference import (
    backward,
    forward,
    weighted,
    weighted_backward,
)

__all__ = ["backward", "forward", "weighted", "weighted_backward"]
