"""Attention in training with dropout of its weights: what is dropped follows from counters."""

from lightning_dhellam.kernels.dropped_attention.base import DroppingBackend, Drops

__all__ = ["DroppingBackend", "Drops"]
