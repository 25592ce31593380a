"""Rotary position embedding on a fused, grouped query-key-value projection (arXiv 2104.09864)."""

from lightning_dhellam.kernels.rope.reference import Heads, backward, forward, split

__all__ = ["Heads", "backward", "forward", "split"]
