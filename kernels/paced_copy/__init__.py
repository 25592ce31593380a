"""A copy that takes a given time on a given number of SMs: one end of an emulated link."""

from lightning_dhellam.kernels.paced_copy.triton import paced_copy

__all__ = ["paced_copy"]
