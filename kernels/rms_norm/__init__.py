"""Root-mean-square normalisation (Zhang and Sennrich, arXiv 1910.07467)."""

from lightning_dhellam.kernels.rms_norm.reference import backward, forward, residual_forward

__all__ = ["backward", "forward", "residual_forward"]
