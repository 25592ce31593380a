"""The three GEMMs of a linear layer."""

from lightning_dhellam.kernels.linear.reference import accumulate_wgrad, dgrad, forward

__all__ = ["accumulate_wgrad", "dgrad", "forward"]
