"""Matrices in 8 bits with scales, and their products: linear layers in FP8.

The formats are those of Micikevicius et al. (arXiv 2209.05433) with a scale of the tensor as it is,
and of DeepSeek-V3 (arXiv 2412.19437) with scales of blocks.
"""

from lightning_dhellam.kernels.fp8.reference import (
    FORWARD,
    GRADIENT,
    ROWS,
    SHRINKS,
    SQUARES,
    WHOLE,
    Block,
    Cast,
    accumulate,
    cast,
    cast_rows,
    largest,
    multiply,
    turn,
    widened,
)

__all__ = [
    "FORWARD",
    "GRADIENT",
    "ROWS",
    "SHRINKS",
    "SQUARES",
    "WHOLE",
    "Block",
    "Cast",
    "accumulate",
    "cast",
    "cast_rows",
    "largest",
    "multiply",
    "turn",
    "widened",
]
