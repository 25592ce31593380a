"""Rows of tokens put in the order of their experts, and back."""

from lightning_dhellam.kernels.permute.reference import (
    Sorted,
    permute,
    sort,
    unpermute,
    unpermute_backward,
)

__all__ = ["Sorted", "permute", "sort", "unpermute", "unpermute_backward"]
