"""Layer normalisation with a bias (Ba et al., arXiv 1607.06450)."""

from lightning_dhellam.kernels.layer_norm.reference import backward, forward, residual_forward

__all__ = ["backward", "forward", "residual_forward"]
