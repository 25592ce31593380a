"""Attention over two blocks of keys made that over both."""

from lightning_dhellam.kernels.merge.reference import forward

__all__ = ["forward"]
