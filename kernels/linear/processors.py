"""How many multiprocessors cuBLAS spreads its GEMMs over.

A GEMM that fills the device keeps communication on multiprocessors waiting until it ends: on an
H200, behind the first GEMM of an MLP of 70B width, for 1.2 ms. If it leaves as many free as a
collective takes, that begins at once, and the results are the same bits.
"""

from __future__ import annotations

import ctypes
import threading
from functools import cache

import torch

from lightning_dhellam.kernels.packages import loaded

_asked = threading.local()
"""How many processors this thread's GEMMs leave free."""


def leave(count: int, device: torch.device) -> None:
    """GEMMs that this thread launches on `device` from now on leave `count` processors free.

    Raises:
        RuntimeError: cuBLAS refuses.
    """
    handle = torch.cuda.current_blas_handle()
    target = 0 if not count else processors(device) - count
    code = _cublas().cublasSetSmCountTarget(ctypes.c_void_p(handle), ctypes.c_int(target))
    if code:
        raise RuntimeError(f"cuBLAS cannot use {target} multiprocessors: status {code}")
    _asked.free = count


def used(device: torch.device) -> int:
    """Multiprocessors that GEMMs of this thread spread over, ours as cuBLAS's."""
    return processors(device) - int(getattr(_asked, "free", 0))


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of `device`."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def _cublas() -> ctypes.CDLL:
    """The library that torch has loaded, whatever its version."""
    torch.cuda.current_blas_handle()
    found = loaded("cublas")
    assert found, "torch has loaded no cuBLAS"
    return ctypes.CDLL(found[0])
