"""Attention among the documents of a sample, none of which sees another."""

from lightning_dhellam.kernels.packed_attention.base import PackedBackend, Runs

__all__ = ["PackedBackend", "Runs"]
