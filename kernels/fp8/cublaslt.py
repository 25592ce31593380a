"""cuBLASLt through nvmath-python: a product adds weight gradients in fp32 to where they lie.

Torch's products in 8 bits only write, so that adding takes a pass of its own: on an H200 that is 10
to 14% of the time of a weight gradient of an 8B model. Casts and all other products are `cublas`'s.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from nvmath import CudaDataType
from nvmath.bindings import cublasLt as lt
from nvmath.bindings.cublas import ComputeType
from torch import Tensor

from lightning_dhellam.kernels.fp8 import cublas
from lightning_dhellam.kernels.fp8.casts import cast, cast_rows, largest, turn
from lightning_dhellam.kernels.fp8.cublas import multiply
from lightning_dhellam.kernels.fp8.reference import FORWARD, GRADIENT, SHRINKS, Cast
from lightning_dhellam.kernels.packages import loaded

__all__ = ["SHRINKS", "accumulate", "cast", "cast_rows", "largest", "multiply", "turn"]

_TYPES = {
    FORWARD: CudaDataType.CUDA_R_8F_E4M3,
    GRADIENT: CudaDataType.CUDA_R_8F_E5M2,
    torch.float32: CudaDataType.CUDA_R_32F,
}
_MULTIPLE = 16
"""Of the sizes of operands in 8 bits."""

_WORKSPACE = 32 << 20
"""Bytes that a product may ask for."""

_ALIGNMENT = 256
"""Bytes of it that cuBLAS makes use of at most."""

_ONE, _ZERO = (np.array([number], dtype=np.float32) for number in (1.0, 0.0))


def accumulate(grad: Tensor, a: Cast, b: Cast, *, first: bool = False) -> None:
    """Compute what `reference.accumulate` does."""
    product = _product_of(grad, a, b)
    if product is None:
        cublas.accumulate(grad, a, b, first=first)
    else:
        product.add(grad, a, b, _ZERO if first else _ONE)


@dataclass(frozen=True)
class _Product:
    """What cuBLASLt has been told of a product, and the algorithm that it takes.

    Matrices are column by column for it: it computes the gradient turned, of the operands turned.

    Attributes:
        description: of the operation.
        layouts: of both operands and of the gradient.
        found: the algorithm, and how large a workspace it takes.
    """

    description: int
    layouts: tuple[int, int, int]
    found: NDArray[np.void]

    def add(self, grad: Tensor, a: Cast, b: Cast, kept: NDArray[np.float32]) -> None:
        """Add to as much of the gradient as is `kept`."""
        attributes = lt.MatmulDescAttribute
        _put(self.description, attributes.A_SCALE_POINTER, b.scale.data_ptr())
        _put(self.description, attributes.B_SCALE_POINTER, a.scale.data_ptr())
        size = int(self.found["workspace_size"][0])
        # Of the stream's own: another stream may compute the same product meanwhile.
        space = torch.empty(size, dtype=torch.uint8, device=grad.device)
        of_b, of_a, of_grad = self.layouts
        lt.matmul(
            torch.cuda.current_blas_handle(),
            self.description,
            _ONE.ctypes.data,
            b.values.data_ptr(),
            of_b,
            a.values.data_ptr(),
            of_a,
            kept.ctypes.data,
            grad.data_ptr(),
            of_grad,
            grad.data_ptr(),
            of_grad,
            self.found.ctypes.data,
            space.data_ptr(),
            size,
            torch.cuda.current_stream(grad.device).cuda_stream,
        )


def _product_of(grad: Tensor, a: Cast, b: Cast) -> _Product | None:
    """How it is computed; None where it cannot be."""
    (height, depth), width = a.values.shape, len(b.values)
    fits = grad.dtype in _TYPES and grad.is_contiguous()
    if not fits or any(size == 0 or size % _MULTIPLE for size in (height, width, depth)):
        return None
    by_rows = a.scale.dim() == 2
    if by_rows and (len(a.scale), len(b.scale)) != (height, width):
        return None  # squares, of which no weight's gradient is made
    return _product(
        grad.device,
        (height, width, depth),
        (a.values.dtype, b.values.dtype),
        by_rows,
        tuple(_alignment(matrix) for matrix in (b.values, a.values, grad)),
    )


@cache
def _product(
    device: torch.device,
    sizes: tuple[int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    by_rows: bool,
    alignments: tuple[int, ...],
) -> _Product | None:
    """What is asked once for operands of some sizes: descriptions are kept for good."""
    (height, width, depth), (of_a, of_b) = sizes, dtypes
    attributes, preferences = lt.MatmulDescAttribute, lt.MatmulPreferenceAttribute
    if not _is_torchs():
        return None
    description = lt.matmul_desc_create(ComputeType.COMPUTE_32F, _TYPES[torch.float32])
    layouts = (
        lt.matrix_layout_create(_TYPES[of_b], depth, width, depth),
        lt.matrix_layout_create(_TYPES[of_a], depth, height, depth),
        lt.matrix_layout_create(_TYPES[torch.float32], width, height, width),
    )
    preference = lt.matmul_preference_create()
    wanted = {
        preferences.MAX_WORKSPACE_BYTES: _WORKSPACE,
        preferences.MIN_ALIGNMENT_A_BYTES: alignments[0],
        preferences.MIN_ALIGNMENT_B_BYTES: alignments[1],
        preferences.MIN_ALIGNMENT_C_BYTES: alignments[2],
        preferences.MIN_ALIGNMENT_D_BYTES: alignments[2],
    }
    for attribute, number in wanted.items():
        value = np.array([number], dtype=lt.get_matmul_preference_attribute_dtype(attribute))
        lt.matmul_preference_set_attribute(preference, attribute, value.ctypes.data, value.nbytes)
    found = np.zeros(1, dtype=lt.matmul_heuristic_result_dtype)
    count = np.zeros(1, dtype=np.int32)
    handle, one = torch.cuda.current_blas_handle(), layouts[2]
    try:
        _put(description, attributes.TRANSA, 1)
        _put(description, attributes.FAST_ACCUM, 0)
        for mode in (attributes.A_SCALE_MODE, attributes.B_SCALE_MODE) if by_rows else ():
            _put(description, mode, lt.MatmulMatrixScale.VEC128_32F)
        lt.matmul_algo_get_heuristic(
            handle, description, *layouts, one, preference, 1, found.ctypes.data, count.ctypes.data
        )
    except lt.cuBLASLtError:  # an older one knows no such scales
        return None
    finally:
        lt.matmul_preference_destroy(preference)
    return _Product(description, layouts, found) if count[0] else None


@cache
def _is_torchs() -> bool:
    """Whether a handle of torch's means the same to the library that nvmath-python has loaded."""
    torch.cuda.current_blas_handle()
    lt.get_version()
    return len({ctypes.CDLL(path).cublasLtGetVersion() for path in loaded("cublasLt")}) == 1


def _put(description: int, attribute: Any, number: int) -> None:
    value = np.array([number], dtype=lt.get_matmul_desc_attribute_dtype(attribute))
    lt.matmul_desc_set_attribute(description, attribute, value.ctypes.data, value.nbytes)


def _alignment(matrix: Tensor) -> int:
    """The largest power of two up to `_ALIGNMENT` that its address is a multiple of."""
    place = matrix.data_ptr()
    return min(_ALIGNMENT, place & -place)
