"""Rotary position embedding on a fused, grouped query-key-value projection (arXiv 2104.09864)."""

from lightning_dhellam.kernels.rope.reference import backward, forward

__all__ = ["backward", "forward"]
