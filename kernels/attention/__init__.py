"""Causal attention with grouped queries, as an explicit forward and backward."""

from lightning_dhellam.kernels.attention.base import Backend
from lightning_dhellam.kernels.attention.sdpa import BACKENDS

__all__ = ["BACKENDS", "Backend"]
