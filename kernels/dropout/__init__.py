"""Dropout with counter-based random numbers: the same counters give the same mask."""

from lightning_dhellam.kernels.dropout.reference import backward, derive_key, forward, forward_add

__all__ = ["backward", "derive_key", "forward", "forward_add"]
