"""Dropout with counter-based random numbers: the same counters give the same mask."""

from lightning_dhellam.kernels.dropout.reference import backward, fold, forward, forward_add

__all__ = ["backward", "fold", "forward", "forward_add"]
