"""The GEMMs of a linear layer, and its bias."""

from lightning_dhellam.kernels.linear.reference import (
    SHRINKS,
    accumulate_bias_grad,
    accumulate_wgrad,
    dgrad,
    forward,
)

__all__ = ["SHRINKS", "accumulate_bias_grad", "accumulate_wgrad", "dgrad", "forward"]
