"""Vocabulary-parallel embedding: each rank holds a range of rows."""

from lightning_dhellam.kernels.embedding.reference import accumulate_wgrad, forward

__all__ = ["accumulate_wgrad", "forward"]
