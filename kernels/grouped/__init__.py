"""GEMMs of several weights at once, each with its own rows: the linear layers of experts."""

from lightning_dhellam.kernels.grouped.reference import (
    SHRINKS,
    add_bias_,
    bias_grad,
    data_grad,
    forward,
    weight_grad,
)

__all__ = ["SHRINKS", "add_bias_", "bias_grad", "data_grad", "forward", "weight_grad"]
